#!/usr/bin/env bash
# Where nodes meet, on a machine that is none of them, so that any of them may die: launch/store.sh [PORT], there, before
# the nodes start with HOST=that machine. It holds who takes part, in memory; it ends by a signal.
set -euo pipefail
exec python -c '
import datetime, signal, sys, torch.distributed as dist
store = dist.TCPStore("0.0.0.0", int(sys.argv[1]), None, True, datetime.timedelta(seconds=60), wait_for_workers=False)
print(f"nodes can meet at port {store.port}", flush=True)
signal.pause()' "${1:-29500}"
