"""Every engine, the same training: step time against native's, bytes that a rank sends, memory that it needs at most.

Each strategy of a library races against that of native which holds the same on a rank, as a rule that of the same name:
both train in the same ranks and take turns, one step each, so the machine's noise falls on both alike. A step's time is
that of the slowest rank; a ratio is the median over rounds of native's time by the library's in the same round: below 1
native is faster. Libraries keep state in their modules, and their singletons tolerate no second training, so every pair
has fresh processes, and in each lap all pairs have their turn. Processor time, of the busiest rank, tells who does more
work on a machine that others use too.

Bytes and memory are measured in processes that do nothing else. Bytes are what the network interface counted, in a
network namespace of one's own where there can be one, and what the collectives have to send at least. Memory is the
most that was alive in tensors at once, and the growth of the process, which has buffers of gloo and of Python as well.

Run: python benchmarks/engines.py --json docs/engines.json --page docs/benchmarks.md --figure docs/engines.svg
Again without measuring: python benchmarks/engines.py --again docs/engines.json --page ... --figure ...
Exit code 1: a ratio is above its bound.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engines_page import CLASSES, figure, printed, rewrite
from ratios import Ratio, command_line, end
from rich.console import Console
from work import DATA, MODEL, race
from work_engines import Weight, weigh

from sandbox.config import Model
from sandbox.model import build
from sandbox.plan import engines, find, missing, preload, required, strategies
from sandbox.runtime import launch, warm

TIMEOUT = 600.0
LIKE = {("fairscale", "fsdp"): "zero3"}  # by what a rank holds: ranges of flat parameters, where ours has rows
ENGINES = [engine for engine in engines() if not missing(engine)]


def main() -> None:
    parser = command_line(__doc__, ranks=2, rounds=10, rows=4, json=True)
    parser.add_argument("--laps", type=int, default=2, help="turns of each pair, in fresh processes (default: 2)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES[1:], default=ENGINES[1:], help="default: all installed")
    parser.add_argument("--strategies", nargs="+", help="default: all of the data axis")
    parser.add_argument("--layers", type=int, default=MODEL["layers"], help="of the model (default: %(default)s)")
    parser.add_argument("--width", type=int, default=MODEL["width"], help="64 for each head (default: %(default)s)")
    parser.add_argument("--by", choices=["time", "processor"], default="time", help="which ratio the bound is of")
    parser.add_argument("--bound", type=float, default=1.0, help="the most that a ratio may be (default: 1)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="rewrite the table in this page")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the figure there, an SVG")
    parser.add_argument("--again", type=Path, metavar="FILE", help="measure nothing: take the results of --json")
    parser.add_argument("--own-network", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.again:
        results = json.loads(args.again.read_text(encoding="utf-8"))
    else:
        if not args.own_network:
            begin_again_in_own_network()
        results = measure(args)
    Console(width=140).print(printed(results, args.by, args.bound))
    if args.page:
        rewrite(args.page, results)
    if args.figure:
        args.figure.write_text(figure(results), encoding="utf-8")
    ratios = [cell[args.by]["middle"] for cell in results["cells"] if cell["engine"] != "native"]
    end(max(ratios, default=0) <= args.bound, results, args.json)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it is written to --json."""
    warm(*(module for engine in args.engines for module in preload(engine)))
    pairs = list(cells(args.engines, args.strategies))
    like = {pair: LIKE.get(pair, pair[1]) for pair in pairs}
    natives = [("native", name) for name in dict.fromkeys(like.values())]
    like |= {cell: cell[1] for cell in natives}
    model = MODEL | {"layers": args.layers, "width": args.width, "heads": max(1, args.width // 64)}
    common = {"model": model, "data": DATA, "train": {"batch": args.rows * args.ranks, "dtype": "float32"}}

    def sections(engine: str, name: str) -> dict[str, Any]:
        return {"engine": engine, "mesh": {"dp": {"degree": args.ranks, "strategy": name}}}

    seconds, processor = defaultdict[Any, list[float]](list), defaultdict[Any, list[float]](list)
    before, console = os.getloadavg(), Console(stderr=True)
    with console.status("") as status:
        weights = {}
        for cell in (*natives, *pairs):
            status.update(f"bytes and memory: {' '.join(cell)}")
            job = sections(*cell) | common
            weights[cell] = launch(args.ranks, weigh, job, args.own_network, timeout=TIMEOUT)
        for lap in range(args.laps):
            for engine, name in pairs:
                status.update(f"lap {lap + 1} of {args.laps}: {engine} {name}")
                racers = {"native": sections("native", like[engine, name]), engine: sections(engine, name)}
                found = launch(args.ranks, race, racers, common, args.rounds, timeout=TIMEOUT)[0]
                for kind in racers:
                    seconds[engine, name, kind] += found[kind].seconds
                    processor[engine, name, kind] += found[kind].processor
    for engine, name in pairs:
        ours = like[engine, name]
        seconds["native", ours, "native"] += seconds[engine, name, "native"]
    rows = []
    order = {name: number for number, name in enumerate(CLASSES)}
    for engine, name in sorted([*natives, *pairs], key=lambda cell: order.get(like[cell], len(order))):
        row = {
            "engine": engine,
            "strategy": name,
            "like": like[engine, name],
            "seconds": statistics.median(seconds[engine, name, engine]),
        }
        for kind, times in (("time", seconds), ("processor", processor)):
            if engine != "native":
                ours, theirs = times[engine, name, "native"], times[engine, name, engine]
                row[kind] = Ratio.of(ours, theirs)._asdict()
        rows.append(row | held(weights[engine, name], args.own_network))
    return {
        "versions": {
            name: version(name) for name in dict.fromkeys(["torch", *(n for e in args.engines for n in required(e))])
        },
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(load[0], 1) for load in (before, os.getloadavg())],
        "ranks": args.ranks,
        "rounds": args.laps * args.rounds,
        "training": common,
        "parameters": sum(p.numel() for p in build(Model.model_validate(model), "float32").parameters()),
        "cells": rows,
    }


def cells(chosen: list[str], names: list[str] | None) -> Iterator[tuple[str, str]]:
    """Every strategy of the data axis that a library has, with the library."""
    for engine in chosen:
        for name in strategies(engine):
            if find(engine, name).AXIS == "dp" and (not names or name in names):
                yield engine, name


def held(weights: list[Weight], own_network: bool) -> dict[str, float | None]:
    """Of all ranks: bytes sent on average, memory of the fullest."""
    resident = [weight.resident for weight in weights]
    return {
        "sent": statistics.mean(weight.sent for weight in weights),
        "wire": weights[0].wire if own_network else None,
        "tensors": max(weight.tensors for weight in weights),
        "resident": None if None in resident else max(resident),
    }


def begin_again_in_own_network() -> None:
    """Run this script in a network namespace, where lo carries nothing else. Returns where there can be none."""
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    up = ["ip", "link", "set", "lo", "up"]
    if (
        all(map(shutil.which, ("unshare", "ip")))
        and not subprocess.run([*unshare, *up], capture_output=True, check=False).returncode
    ):
        script = f'{" ".join(up)} && exec "$0" "$@"'
        os.execvp("unshare", [*unshare, "sh", "-c", script, sys.executable, *sys.argv, "--own-network"])


if __name__ == "__main__":
    main()
