#!/usr/bin/env bash
# Start the containers of a compose file; end with the first status of one that is not 0, else with 0 when all have ended.
#
#   docker/cluster.sh [FILE]    - is standard input, for `sandbox launch --on compose`;
#                               left out: docker/compose.yaml, a config that two nodes of two ranks verify
#
# `compose up` by itself asks one container alone, and stops it if another ended first, be it well. Nothing is left.
# SANDBOX_IMAGE: the image's name.
set -euo pipefail
file=${1:-$(dirname "$0")/compose.yaml}
[ "$file" != - ] || file=/dev/stdin
services=$(<"$file")
cd "$(dirname "$0")/.."
# shellcheck source-path=SCRIPTDIR source=engine.sh
. docker/engine.sh
folder=$(mktemp -d)
name=sandbox-cluster-$$
cluster() { compose --project-name "$name" --file "$folder/compose.yaml" "$@"; }
# shellcheck disable=SC2329 # by the trap
finish() {
    cluster down --timeout 1 >/dev/null 2>&1 || :
    rm -r "$folder"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

printf '%s\n' "$services" >"$folder/compose.yaml"
cluster up --detach >&2
declare -A waits
for container in $("$engine" ps --all --quiet --filter "label=com.docker.compose.project=$name"); do
    (exit "$("$engine" wait "$container")") &
    waits[$!]=$container
done
cluster logs --follow --no-color &
logs=$!
status=0
while [ ${#waits[@]} != 0 ] && [ "$status" = 0 ]; do
    wait -n -p ended "${!waits[@]}" || status=$?
    unset "waits[$ended]"
done
cluster stop --timeout 2 >/dev/null 2>&1 || :
wait "$logs" || :
exit "$status"
