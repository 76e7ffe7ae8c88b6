#!/usr/bin/env bash
# Build the image, by whatever this machine has (docker/engine.sh).
#
#   docker/build.sh            ends with 69, and says why, where nothing can build or what it needs cannot be fetched
#   docker/build.sh --twice    also builds it again from nothing: both images must train to the same losses, to the bit
#
# BASE_IMAGE, LOCK: as in docker/Dockerfile. Without BASE_IMAGE, and where the one named there cannot be pulled, Debian's
# packages make the base. SANDBOX_IMAGE: the image's name.
set -euo pipefail; [ -z "${TRACE-}" ] || { PS4="+\t "; set -x; }
cd "$(dirname "$0")/.."
# shellcheck source-path=SCRIPTDIR source=engine.sh
. docker/engine.sh
image=${SANDBOX_IMAGE:-distributed-training-sandbox} again=$image-again lock=${LOCK:-docker/cpu.lock}
: "${PYTHON:=python3}"
finish() {
    rm -f docker/wheels/*.whl
    "$engine" rmi --force "$again" >/dev/null 2>&1 || :
}
trap finish EXIT
say "$engine builds $image."

if [ -z "${BASE_IMAGE-}" ]; then
    named=$(sed -n 's/^ARG BASE_IMAGE=//p' docker/Dockerfile)
    if "$engine" pull --quiet "$named" >/dev/null 2>&1; then
        BASE_IMAGE=$named
    else
        BASE_IMAGE=sandbox-base
        [ "$engine" = docker ] || BASE_IMAGE=localhost/$BASE_IMAGE
        if ! "$engine" image inspect "$BASE_IMAGE" >/dev/null 2>&1; then
            say "$named cannot be pulled: mmdebstrap makes a base of Debian's packages."
            command -v mmdebstrap >/dev/null || unavailable "mmdebstrap is not installed (docker/install.sh)."
            # as for any throw-away root: without waiting for the disk after each file, without manuals
            mmdebstrap --quiet --variant=minbase --include=python3,python3-venv --dpkgopt=force-unsafe-io \
                --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' bookworm - |
                "$engine" import - "$BASE_IMAGE" >/dev/null || unavailable "mmdebstrap could not fetch Debian's packages."
        fi
    fi
fi

options=(--file docker/Dockerfile --build-arg "BASE_IMAGE=$BASE_IMAGE" --build-arg "LOCK=$lock")
fetched=yes # for the image's Python, whichever runs here
"$PYTHON" -m pip download -qq --no-deps --only-binary :all: --python-version 3.11 --require-hashes \
    --dest docker/wheels -r "$lock" || fetched=no
if [ "$fetched" = yes ]; then
    say "pip has fetched here what $lock names: the build needs no network."
    options+=(--build-arg PIP=--no-index)
    [ "$engine" = podman ] || options+=(--network none) # buildah's chroot has this machine's
else
    say "pip cannot fetch here what $lock names: the build will."
    options+=(--network host)
fi
before=$("$engine" image inspect --format '{{.Id}}' "$image" 2>/dev/null || :)
build "${options[@]}" --tag "$image" . || {
    [ "$fetched" = yes ] && exit 1
    unavailable "the build could not fetch what $lock names, either."
}
[ -z "$before" ] || [ "$before" = "$("$engine" image inspect --format '{{.Id}}' "$image")" ] ||
    "$engine" rmi "$before" >/dev/null 2>&1 || : # or each build would leave one without a name

if [ "${1-}" = --twice ]; then
    build "${options[@]}" --no-cache --tag "$again" .
    losses() { # of three steps, all digits; the time that they took left out
        run --network none "$1" sh -c "sandbox run configs/zero2.yaml --set train.steps=3 --set train.eval_batches=1 \
            --folder /tmp/run >/dev/null && grep -o '\"[a-z_]*loss\": [^,]*' /tmp/run/metrics.jsonl"
    }
    first=$(losses "$image") second=$(losses "$again")
    if [ -z "$first" ] || [ "$first" != "$second" ]; then
        say "two builds differ:" "$first" "and" "$second"
        exit 1
    fi
    say "two builds train to the same losses:" "$first"
fi
