#!/usr/bin/env bash
# Start the containers of a compose file, and end with the first status of one that is not 0, else with 0 when all have ended.
#
#   docker/cluster.sh [COMPOSE FILE]    docker/compose.yaml: a config verified by two nodes of two ranks
#
# `compose up` itself asks one container alone, or stops the others when the first ends, be it well. Nothing is left.
# SANDBOX_IMAGE: the image's name.
set -euo pipefail
file=$(realpath "${1:-$(dirname "$0")/compose.yaml}")
cd "$(dirname "$0")/.."
# shellcheck source-path=SCRIPTDIR source=engine.sh
. docker/engine.sh
cluster() { compose --project-name "sandbox-cluster-$$" --file "$file" "$@"; }
trap 'cluster down >/dev/null 2>&1' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

cluster up --detach >&2
containers=$(cluster ps --quiet)
declare -A waits
for container in $containers; do
    (exit "$("$engine" wait "$container")") &
    waits[$!]=$container
done
cluster logs --follow &
logs=$!
status=0
while [ ${#waits[@]} != 0 ] && [ "$status" = 0 ]; do
    wait -n -p ended "${!waits[@]}" || status=$?
    unset "waits[$ended]"
done
cluster stop >/dev/null 2>&1
wait "$logs" || :
exit "$status"
