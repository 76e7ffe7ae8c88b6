"""Tensor, pipeline and context parallelism: ours against torch's, and against one process, as ratios within one run.

All trainers of a group live in the same ranks and take turns, one step each, so the machine's noise falls on all alike.
A step's time is that of the slowest rank; a ratio is the median over rounds of the two times in the same round. The
overhead of a collective is what a step takes beyond 1/n of the step of one process, by the collectives of the step: it
holds waiting, bubbles and copies, and means little if there are fewer cores than ranks. Processor time of the busiest
rank tells who does more work, on a machine that others use too.

Run: python benchmarks/axes.py --ranks 2 --rounds 20 --groups tensor pipeline context
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from work import DATA, MODEL
from work_axes import one_document, race

from sandbox.runtime import launch

PLAIN = "one process"


class Group(NamedTuple):
    """Trainers of one batch and model, and whose ratios count: ours, theirs, the most that the ratio may be."""

    racers: dict[str, dict[str, Any]]
    pairs: list[tuple[str, str, float]]
    common: dict[str, Any]


def groups(ranks: int, sequence: int, file: str) -> dict[str, Group]:
    """What races against what."""

    def both(**axes: dict[str, Any]) -> dict[str, dict[str, Any]]:
        mesh = {axis: {"degree": ranks, **options} for axis, options in axes.items()}
        return {"native": {"mesh": mesh}, "torch": {"engine": "torch", "mesh": mesh}}

    def racers(**kinds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {f"{engine} {kind}": racer for kind, pair in kinds.items() for engine, racer in pair.items()}

    def ring(**options: Any) -> dict[str, Any]:
        return {"mesh": {"cp": {"degree": ranks, **options}}}

    tensor = racers(tp=both(tp={}), tp_sequence=both(tp={"sequence": True}))
    pipeline = racers(
        pp_1f1b=both(pp={"schedule": "1f1b"}),
        pp_interleaved=both(pp={"schedule": "interleaved"}),
        pp_zbv=both(pp={"schedule": "zbv"}),
    )
    context = {
        "native ring": ring(),
        "torch ring": ring() | {"core": "torch"},
        "native gather": ring(kind="gather"),
        "contiguous ring": ring(order="contiguous"),
    }
    wide = {"model": MODEL, "data": DATA}
    long = {"model": {"layers": 2, "width": 64, "heads": 2}, "data": {"sequence": sequence, "files": [file]}}
    return {
        "tensor": Group(tensor, versus(tensor), {**wide, "train": {"batch": 4 * ranks}}),
        "pipeline": Group(
            pipeline, versus(pipeline), {**wide, "train": {"batch": 4 * ranks, "microbatches": 2 * ranks}}
        ),
        "context": Group(
            context,
            [
                ("native ring", "torch ring", 1.0),
                ("native ring", "native gather", 1.05),
                ("native ring", "contiguous ring", 0.95),
            ],
            {**long, "train": {"batch": 1}},
        ),
    }


def versus(racers: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Each of ours against torch's of the same kind: no slower."""
    return [(name, name.replace("native", "torch"), 1.0) for name in racers if name.startswith("native")]


def main() -> None:
    """Print the tables; exit 1 if a ratio is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sequence", type=int, default=4096, help="columns in the group context")
    parser.add_argument("--groups", nargs="+", default=["tensor", "pipeline", "context"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, good = [], True
    with tempfile.TemporaryDirectory() as folder:
        choices = groups(args.ranks, args.sequence, str(one_document(folder)))
        for name in args.groups:
            group = choices[name]
            racers = {PLAIN: {}, **group.racers}
            measured = launch(args.ranks, race, racers, group.common, args.rounds, timeout=600)[0]
            table = Table("ranks", name, "ms", "processor ms", "of one process", "collectives", "us each", box=None)
            whole = measured[PLAIN][0]
            for racer, (seconds, used, count) in measured.items():
                low, ratio, high = quartiles(seconds, whole)
                extra = statistics.median(a - b / args.ranks for a, b in zip(seconds, whole, strict=True))
                ours = not racer.startswith((PLAIN, "torch"))  # only ours are counted
                counted = (str(count), f"{extra / count * 1e6:.0f}") if ours else ("-", "-")
                times = [f"{statistics.median(some) * 1e3:.0f}" for some in (seconds, used)]
                table.add_row(str(args.ranks), racer, *times, f"{ratio:.3f} ({low:.3f} to {high:.3f})", *counted)
                rows.append({"ranks": args.ranks, "racer": racer, "s": statistics.median(seconds), "of_one": ratio})
            Console(width=120).print(table)
            for mine, theirs, bound in group.pairs:
                low, ratio, high = quartiles(measured[mine][0], measured[theirs][0])
                work = quartiles(measured[mine][1], measured[theirs][1])[1]
                good &= ratio <= bound
                mark, among = "✓" if ratio <= bound else "✗", f"{low:.3f} to {high:.3f}; bound {bound}"
                print(f"{mark} {mine} / {theirs}: {ratio:.3f} ({among}), processor {work:.3f}")
                row = {"ranks": args.ranks, "ours": mine, "theirs": theirs, "ratio": ratio, "bound": bound}
                rows.append(row | {"processor_ratio": work})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    sys.exit(not good)


def quartiles(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Of the ratios in each round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return low, middle, high


if __name__ == "__main__":
    main()
