#!/usr/bin/env bash
# DeepSpeed's launcher, on a machine that reaches those of launch/hostfile over ssh:
# NODES=2 GPUS=2 launch/deepspeed.sh configs/hsdp.yaml
set -euo pipefail
exec deepspeed --hostfile launch/hostfile --num_nodes "${NODES:?how many nodes}" \
    --num_gpus "${GPUS:?how many ranks on each}" --no_local_rank --module sandbox run "$@"
