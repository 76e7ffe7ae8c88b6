#!/usr/bin/env bash
# This machine; the mesh says how many processes: launch/local.sh configs/zero2.yaml
set -euo pipefail
exec python -m sandbox run "$@"
