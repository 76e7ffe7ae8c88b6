#!/usr/bin/env bash
# One node, a rank on each of its GPUs (or as many processes): GPUS=2 launch/torchrun.sh configs/zero2.yaml
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${GPUS:?how many ranks}" -m sandbox run "$@"
