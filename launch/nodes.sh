#!/usr/bin/env bash
# Several nodes that meet at HOST, one of them. On each: HOST=node0 NODES=2 GPUS=2 launch/nodes.sh configs/hsdp.yaml
# ADDRESS: this node's own, if the others do not know its name. RESTARTS: how often the ranks start again, on all nodes,
# when one fails; say --autoresume too. A node that went and came back is then taken for a new one after 3 s.
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a restart meets the addresses of the attempt before
exec torchrun --nnodes "${NODES:?how many nodes}" --nproc-per-node "${GPUS:?how many ranks on each}" \
    --rdzv-id "$(basename "${1:?which config}" .yaml)" --rdzv-backend c10d --rdzv-endpoint "${HOST:?where to meet}:29500" \
    ${RESTARTS:+--max-restarts "$RESTARTS" --rdzv-conf keep_alive_interval=1,keep_alive_max_attempt=3} \
    ${ADDRESS:+--local-addr "$ADDRESS"} -m sandbox run "$@"
