"""What a slow network does: step time of each strategy between two hosts, against the bytes that had to cross.

Two hosts, emulated on this machine (launch/cluster), can send each other --rate; what stays on a host is not slowed.
A step can end no sooner than its bytes have crossed: `bytes / rate`. What a strategy hides of that behind computation
shows against the same step with nothing slowed: a step as long as the larger of the two hides all, as the sum nothing.
Bytes are those that the hosts' network cards counted, that of the busier host, beside what the strategies' formulas say
of one rank. All trainers live in the same ranks, and their steps take turns.

Run, as root: python benchmarks/slow_link.py --rounds 3 --json runs/slow-link.json --figure docs/slow-link.svg
Then the page: sandbox report runs/slow-link.json
Exit code 1: a step was faster than its bytes, or sharding inside of hosts gained nothing.
"""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ratios import command_line, end
from rich.console import Console
from rich.table import Table

from sandbox.config import Config
from sandbox.report.links import SlowLink
from sandbox.runtime import Member, attach, attached, leave

CLUSTER = Path(__file__).parents[1] / "launch/cluster/cluster.sh"
MODEL = {"layers": 4, "width": 192, "heads": 4, "hidden": 512}  # 1.9 M parameters, 7.5 MB
ONE_EACH: dict[str, dict[str, Any]] = {  # a rank on each of two hosts: all that a rank sends crosses
    "ddp": {"dp": {"degree": 2, "strategy": "ddp", "bucket_mb": 1}},
    "ddp, one bucket": {"dp": {"degree": 2, "strategy": "ddp", "bucket_mb": 1000}},
    "zero1": {"dp": {"degree": 2, "strategy": "zero1", "bucket_mb": 1}},
    "zero1, one bucket": {"dp": {"degree": 2, "strategy": "zero1", "bucket_mb": 1000}},
    "zero2": {"dp": {"degree": 2, "strategy": "zero2", "bucket_mb": 1}},
    "zero2, one bucket": {"dp": {"degree": 2, "strategy": "zero2", "bucket_mb": 1000}},
    "zero3": {"dp": {"degree": 2, "strategy": "zero3"}},
    "zero3, no prefetch": {"dp": {"degree": 2, "strategy": "zero3", "prefetch": False}},
    "fsdp": {"dp": {"degree": 2, "strategy": "fsdp"}},
    "fsdp, no prefetch": {"dp": {"degree": 2, "strategy": "fsdp", "prefetch": False}},
    "context, ring": {"cp": {"degree": 2}},
    "pipeline, 1f1b": {"pp": {"degree": 2}},
}
TWO_EACH: dict[str, dict[str, Any]] = {  # two ranks on each: what crosses depends on which axis does
    "fsdp over all": {"dp": {"degree": 4, "strategy": "fsdp"}},
    "hsdp: shards inside": {"dp": {"degree": 4, "replicas": 2, "strategy": "fsdp"}},
    "tp over all": {"tp": {"degree": 4}},
    "tp inside, ddp between": {"dp": {"degree": 2, "bucket_mb": 1}, "tp": {"degree": 2}},
}
OTHERS = {  # what each should beat: overlap off, or no hierarchy
    "hsdp: shards inside": "fsdp over all",
    "tp inside, ddp between": "tp over all",
} | {name: other for name in ONE_EACH for other in (f"{name}, one bucket", f"{name}, no prefetch") if other in ONE_EACH}


def main() -> None:
    parser = command_line(__doc__, rounds=3, rows=8, json=True)
    parser.add_argument("--rate", default="100mbit", help="between hosts, in mbit (default: 100mbit)")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw it there, an SVG")
    args = parser.parse_args()
    if attached():
        world = int(os.environ["WORLD_SIZE"])
        kinds = ONE_EACH if world == 2 else TWO_EACH
        rows = attach(world, measure, kinds, args.rows * world, args.rounds, timeout=120)
        if os.environ["RANK"] == "0":
            print(json.dumps(rows))
        leave(0)
    rate = 1e6 * float(re.fullmatch(r"(\d+)mbit", args.rate)[1]) / 8
    rows = [row for gpus in (1, 2) for row in hosts(gpus, args.rate)]
    table = Table("ranks", "strategy", "formula MB", "crossed MB", "bytes/rate s", "step s", "fast link s", box=None)
    for row in rows:
        row |= {"least": row["crossed"] / rate, "other": OTHERS.get(row["name"], "")}
        sent = f"{row['sent'] / 1e6:.2f}"
        numbers = [f"{row[key]:.2f}" for key in ("least", "slow", "fast")]
        table.add_row(row["ranks"], row["name"], sent, f"{row['crossed'] / 1e6:.2f}", *numbers)
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(SlowLink(rate=args.rate, steps=rows).model_dump_json(indent=1), encoding="utf-8")
    if args.figure:
        draw(args.figure, rows, args.rate)
    slow = {row["name"]: row["slow"] for row in rows}
    inside = (
        slow["hsdp: shards inside"] < slow["fsdp over all"] and slow["tp inside, ddp between"] < slow["tp over all"]
    )
    end(inside and all(row["slow"] >= 0.95 * row["least"] for row in rows), rows, args.json)


def hosts(gpus: int, rate: str) -> list[dict[str, Any]]:
    """Measure on two hosts with `gpus` ranks each, with a slow link and with a fast one."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(gpus)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29500"]
    text = f'{shlex.join(torchrun)} --local-addr "$ADDRESS" {shlex.join([__file__, *sys.argv[1:]])}'
    results = []
    for speed in (["-r", rate], []):
        script = [CLUSTER, "-n", "2", *speed, "sh", "-c", text]
        done = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{"))))
    slow, fast = results
    return [
        {"ranks": f"2 x {gpus}", "slow": row.pop("seconds"), "fast": other["seconds"]} | row
        for row, other in zip(slow, fast, strict=True)
    ]


def measure(member: Member, kinds: dict[str, dict[str, Any]], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Each kind's step: median seconds of the slowest rank, bytes that left the busier host, bytes of the formula."""
    import torch
    import torch.distributed as dist

    from sandbox.data import Corpus
    from sandbox.mesh import Mesh
    from sandbox.plan import predict
    from sandbox.trainer import Trainer

    trainers, configs = [], []
    for mesh in kinds.values():
        train = {"batch": batch, "microbatches": 4 if "pp" in mesh else 1}
        config = Config.model_validate({"mesh": mesh, "model": MODEL, "data": {"sequence": 128}, "train": train})
        placed = Mesh(config.mesh.degrees, member.rank, member.device)
        trainers.append(Trainer(config, placed, torch.device(member.device), Corpus.load(config.data)))
        configs.append(config)
    seconds: list[list[float]] = [[] for _ in kinds]
    crossed = [0.0 for _ in kinds]
    for round_ in range(rounds + 1):
        for number, trainer in enumerate(trainers):
            dist.barrier()
            before, taken = sent_by_this_host(), trainer.train_step().seconds
            dist.barrier()
            both = torch.tensor([taken, sent_by_this_host() - before], dtype=torch.float64)
            dist.all_reduce(both, dist.ReduceOp.MAX)
            if round_:  # the first allocates
                seconds[number].append(both[0].item())
                crossed[number] = both[1].item()
    return [
        {
            "name": name,
            "seconds": statistics.median(seconds[number]),
            "crossed": crossed[number],
            "sent": max(sum(rank.traffic.values()) for rank in predict(configs[number])),
        }
        for number, name in enumerate(kinds)
    ]


def sent_by_this_host() -> int:
    """Bytes that have left by eth0, with what TCP adds."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.strip().startswith("eth0:")).split(":")[1].split()[8])


def draw(path: Path, rows: list[dict[str, Any]], rate: str) -> None:
    """One bar a strategy: the step; a tick where its bytes alone would end, a dot for the step on a fast link."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10, "svg.hashsalt": "sandbox"}):
        figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
        axes = figure.subplots()
        places = [-number - (1 if row["ranks"] == "2 x 2" else 0) for number, row in enumerate(rows)]
        axes.barh(places, [row["slow"] for row in rows], color="#c9d8ea", label=f"step, {rate} between hosts")
        least = [row["least"] for row in rows]
        axes.scatter(least, places, marker="|", s=260, color="#b93a1e", linewidths=2, label="bytes / rate", zorder=3)
        axes.scatter([row["fast"] for row in rows], places, color="#3a6fb0", label="step, fast link", zorder=3)
        axes.set_yticks(places, [f"{row['name']} ({row['ranks']})" for row in rows])
        axes.set_xlabel("seconds")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
