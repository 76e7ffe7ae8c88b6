#!/usr/bin/env bash
# As nodes.sh, with MIN:MAX nodes; the ranks start again, RESTARTS times at most, when one fails or a node comes or goes:
# HOST=node0 NODES=1:2 GPUS=2 RESTARTS=3 launch/elastic.sh configs/hsdp.yaml --set run.checkpoint_every=10 \
#     --autoresume --min-ranks 2
# WAIT: how many seconds to wait for MIN nodes. HOST may keep launch/store.sh, and be none of the nodes.
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a restart meets the addresses of the attempt before
# A node that went is noticed after 3 s instead of 15, and who may yet come is waited for 3 s instead of 30.
exec torchrun --nnodes "${NODES:?MIN:MAX nodes}" --nproc-per-node "${GPUS:?how many ranks on each}" \
    --rdzv-id "$(basename "${1:?which config}" .yaml)" --rdzv-backend c10d --rdzv-endpoint "${HOST:?where to meet}:29500" \
    --rdzv-conf "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3,join_timeout=${WAIT:-600}" \
    --max-restarts "${RESTARTS:-3}" ${ADDRESS:+--local-addr "$ADDRESS"} -m sandbox run "$@"
