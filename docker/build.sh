#!/usr/bin/env bash
# Build the image, and verify a config in a cluster of its containers, by whatever engine this machine has.
#
#   docker/build.sh            ends with the status of the verification
#   docker/build.sh --twice    also builds it again from nothing: both images must train to the same losses, to the bit
#
# BASE_IMAGE, LOCK: as in docker/Dockerfile. Without BASE_IMAGE and without docker, Debian's packages make the base.
# Names beginning with `sandbox-check` are this script's own.
set -euo pipefail
cd "$(dirname "$0")/.."
image=distributed-training-sandbox lock=${LOCK:-docker/cpu.lock}
: "${PYTHON:=python3}"
say() { echo "docker/build.sh: $*" >&2; }

if docker info >/dev/null 2>&1; then
    say "docker is running: it builds and runs."
    build() { docker build "$@"; }
    run() { docker run --rm "$@"; }
    compose() { docker compose "$@"; }
elif [ "$(id -u)" = 0 ] && command -v buildah podman runc podman-compose >/dev/null; then
    say "no docker is running: buildah builds, podman runs."
    # chroot, runc and low limits: what works inside a container or a small virtual machine, too
    limits="--ulimit nofile=1024:1024 --ulimit nproc=4096:4096"
    build() { buildah bud --isolation chroot --format docker --pull-never "$@"; }
    # shellcheck disable=SC2086 # several words
    run() { podman --runtime runc run --rm $limits "$@"; }
    compose() { podman-compose --podman-args "--runtime runc" --podman-run-args "$limits" "$@"; }
    if [ -z "${BASE_IMAGE-}" ]; then
        BASE_IMAGE=localhost/sandbox-base
        if ! podman image exists "$BASE_IMAGE"; then
            say "no BASE_IMAGE is named: mmdebstrap makes one of Debian's packages."
            mmdebstrap --quiet --variant=minbase --include=python3,python3-venv bookworm - |
                podman import --quiet - "$BASE_IMAGE" >/dev/null
        fi
    fi
else
    say "nothing here can build an image. Start docker; or, as root, install buildah podman runc mmdebstrap" \
        "netavark aardvark-dns (packages of Debian) and podman-compose (of pip)."
    exit 2
fi

options=(--file docker/Dockerfile --build-arg "LOCK=$lock")
[ -z "${BASE_IMAGE-}" ] || options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
if "$PYTHON" -m pip download --quiet --no-deps --require-hashes --dest docker/wheels -r "$lock"; then
    say "pip has fetched here what the lock names: the build needs no network."
    options+=(--build-arg PIP=--no-index)
else
    say "pip cannot fetch here what the lock names: the build will."
fi
build "${options[@]}" --tag "$image" .

if [ "${1-}" = --twice ]; then
    build "${options[@]}" --no-cache --tag sandbox-check .
    losses() { # of three steps, all digits; the time that they took left out
        run --network none "$1" sh -c "sandbox run configs/zero2.yaml --set train.steps=3 --set train.eval_batches=1 \
            --folder /tmp/run >/dev/null && grep -o '\"[a-z_]*loss\": [^,]*' /tmp/run/metrics.jsonl"
    }
    first=$(losses "$image") second=$(losses sandbox-check)
    if [ "$first" != "$second" ]; then
        say "two builds differ:" "$first" "and" "$second"
        exit 1
    fi
    say "two builds train to the same losses:" "$first"
fi

compose --file docker/compose.yaml up --abort-on-container-exit --exit-code-from node0 && status=0 || status=$?
compose --file docker/compose.yaml down >/dev/null 2>&1 || true
exit "$status"
