#!/usr/bin/env bash
# What docker/ and launch/cluster need and this machine lacks, from Debian's packages: as root, where there is apt. With
# docker running that is little. Never fails: what is still missing then is said by what needs it.
set -euo pipefail
say() { echo "docker/install.sh: $*" >&2; }

declare -A package=([ip]=iproute2 [tc]=iproute2 [mmdebstrap]=mmdebstrap) missing=()
if ! docker info >/dev/null 2>&1; then # the last three make podman's networks
    package+=([buildah]=buildah [podman]=podman [runc]=runc)
    package+=([iptables]=iptables [/usr/lib/podman/netavark]=netavark [/usr/lib/podman/aardvark-dns]=aardvark-dns)
fi
for command in "${!package[@]}"; do
    command -v "$command" >/dev/null || missing[${package[$command]}]=1
done
[ ${#missing[@]} != 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    say "not installed, for that needs root and apt: ${!missing[*]}."
    exit 0
fi
say "installs ${!missing[*]}."
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -qq --no-install-recommends "${!missing[@]}" >/dev/null; }
install 2>/dev/null || { apt-get update -qq && install; } || say "apt could not install ${!missing[*]}."
