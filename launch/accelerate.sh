#!/usr/bin/env bash
# Hugging Face's launcher. On each node, HOST being number 0:
# HOST=node0 NODES=2 GPUS=2 RANK=0 launch/accelerate.sh configs/hsdp.yaml
# --multi_gpu starts a world of several processes, without GPUs too; --cpu would have every machine train by itself.
set -euo pipefail
exec accelerate launch --multi_gpu \
    --num_machines "${NODES:?how many nodes}" --num_processes "$((NODES * ${GPUS:?how many ranks on each}))" \
    --main_process_ip "${HOST:?which node is number 0}" --main_process_port 29500 \
    --machine_rank "${RANK:?the number of this node}" -m sandbox run "$@"
