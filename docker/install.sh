#!/usr/bin/env bash
# What docker/build.sh and launch/cluster need and this machine lacks, from Debian's packages: as root, where there is apt.
# Nothing, if docker runs, or all is there; and nothing is changed elsewhere. Never fails: what is missing then says so itself.
set -euo pipefail
say() { echo "docker/install.sh: $*" >&2; }

declare -A package=([ip]=iproute2 [tc]=iproute2)
if ! docker info >/dev/null 2>&1; then # the last three make podman's networks
    package+=([buildah]=buildah [podman]=podman [runc]=runc [mmdebstrap]=mmdebstrap)
    package+=([iptables]=iptables [/usr/lib/podman/netavark]=netavark [/usr/lib/podman/aardvark-dns]=aardvark-dns)
fi
missing=()
for command in "${!package[@]}"; do
    command -v "$command" >/dev/null || missing+=("${package[$command]}")
done
[ ${#missing[@]} != 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    say "not installed, for that needs root and apt: ${missing[*]}."
    exit 0
fi
say "installs ${missing[*]}."
export DEBIAN_FRONTEND=noninteractive
apt-get install --yes --quiet --no-install-recommends "${missing[@]}" >&2 ||
    { apt-get update --quiet >&2 && apt-get install --yes --quiet --no-install-recommends "${missing[@]}" >&2; } ||
    say "apt could not install ${missing[*]}."
