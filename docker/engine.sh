# Sourced by the scripts beside it: $engine, build, run and compose are docker's where docker runs, else buildah's and
# podman's, for root. Where there is neither, or half of one, the script says what to do and ends with 69 (EX_UNAVAILABLE).
# shellcheck shell=bash disable=SC2034 # engine is used there
say() { echo "$0: $*" >&2; }
unavailable() {
    say "$*"
    exit 69
}

if docker info >/dev/null 2>&1; then
    engine=docker
    build() { DOCKER_BUILDKIT=1 docker build "$@"; }
    run() { docker run --rm "$@"; }
    if docker compose version >/dev/null 2>&1; then
        compose() { docker compose "$@"; }
    elif command -v docker-compose >/dev/null; then
        compose() { docker-compose "$@"; }
    else
        compose() { unavailable "docker runs here, but without its compose plugin. Install it, or docker-compose."; }
    fi
elif [ "$(id -u)" = 0 ] && command -v buildah >/dev/null && command -v podman >/dev/null && command -v runc >/dev/null; then
    engine=podman
    # chroot, runc and low limits: what works inside a container or a small virtual machine, too
    limits="--ulimit nofile=1024:1024 --ulimit nproc=4096:4096"
    [ -S /run/systemd/private ] || limits+=" --no-healthcheck" # for which podman needs systemd
    build() { buildah bud --isolation chroot --format docker --pull-never "$@"; }
    # shellcheck disable=SC2086 # several words
    run() { podman --runtime runc run --rm $limits "$@"; }
    if command -v podman-compose >/dev/null; then
        compose() { podman-compose --podman-args "--runtime runc" --podman-run-args "$limits" "$@"; }
    else
        compose() { unavailable "podman is here, but not podman-compose (of pip)."; }
    fi
else
    unavailable "nothing here runs containers. Start docker; or, as root, docker/install.sh installs buildah, podman and" \
        "runc from Debian's packages."
fi
