#!/usr/bin/env bash
# A cluster on this machine: hosts node0, node1, ... with their own names, network and processes, and slow links between.
#
#   launch/cluster/cluster.sh [-n NODES] [-r RATE] COMMAND [ARGUMENT]...
#
# runs COMMAND on every host at once, with NODE (its number), NODES, HOST (node0) and ADDRESS (its own), and ends with the
# first status that is not 0. RATE is what a host can send to the others, as tc writes it: 100mbit. For example
#
#   GPUS=2 launch/cluster/cluster.sh -n 2 -r 100mbit launch/nodes.sh configs/hsdp.yaml
#
# Needs root, and ip and tc (of iproute2). It all hangs on one process, so that the kernel takes it away when that ends,
# however it ends: no namespace, link or file is left, and this machine's own network is not touched.
#
#   unshare        a namespace with a bridge, and its own process ids: when its first process ends, so do all
#     node0        a namespace with eth0 = 10.77.0.1, its own host name
#     node1        ...
set -euo pipefail

if [ "${1-}" != --inside ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "An emulated cluster needs root: it makes network namespaces." >&2
        exit 2
    fi
    for tool in ip tc unshare nsenter setpriv; do
        command -v "$tool" >/dev/null || {
            echo "An emulated cluster needs $tool (packages iproute2 and util-linux)." >&2
            exit 2
        }
    done
    setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc -- "$0" --inside "$@" &
    trap 'kill -KILL $! 2>/dev/null || :' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    wait $!
    exit
fi
shift

nodes=2 rate=
while getopts n:r: option; do
    case $option in
    n) nodes=$OPTARG ;;
    r) rate=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
: "${1:?which command}"

ip link add name bridge type bridge
ip link set bridge up
mount -t tmpfs none /mnt # seen from here only
echo 127.0.0.1 localhost >/mnt/hosts
for ((node = 0; node < nodes; node++)); do
    echo "10.77.0.$((node + 1)) node$node" >>/mnt/hosts
done

holders=()
for ((node = 0; node < nodes; node++)); do
    unshare --net --mount --uts sleep infinity &
    holders+=($!)
    until [ "$(readlink "/proc/$!/ns/uts")" != "$(readlink /proc/self/ns/uts)" ] && # unshare has come so far
        [ "$(cat "/proc/$!/comm")" = sleep ]; do
        sleep 0.01
    done
    ip link add "port$node" type veth peer name eth0 netns $!
    ip link set "port$node" master bridge up
    nsenter --target $! --net --mount --uts -- bash -euc "
        hostname node$node
        mount --bind /mnt/hosts /etc/hosts
        ip link set lo up
        ip address add 10.77.0.$((node + 1))/24 dev eth0
        ip link set eth0 up
        if [ -n '$rate' ]; then tc qdisc add dev eth0 root tbf rate '$rate' burst 64kb latency 50ms; fi"
done

export NODES=$nodes HOST=node0
declare -A commands
for ((node = 0; node < nodes; node++)); do
    NODE=$node ADDRESS=10.77.0.$((node + 1)) \
        nsenter --target "${holders[node]}" --net --mount --uts --wd="$PWD" -- "$@" </dev/null &
    commands[$!]=$node
done
status=0
while [ ${#commands[@]} != 0 ] && [ "$status" = 0 ]; do
    wait -n -p ended "${!commands[@]}" || status=$?
    unset "commands[$ended]"
done
if [ "$status" != 0 ] && [ ${#commands[@]} != 0 ]; then
    sleep 3 # for what the others have to say of it; then they end with this process
fi
exit "$status"
