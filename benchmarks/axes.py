"""Tensor, pipeline and context parallelism: ours against torch's, and against one process, as ratios within one run.

All trainers of a group live in the same ranks and take turns, one step each, so the machine's noise falls on all alike.
A step's time is that of the slowest rank; a ratio is the median over rounds of the two times in the same round. The
overhead of a collective is what a step takes beyond 1/n of the step of one process, by the collectives of the step: it
holds waiting, bubbles and copies, and means little if there are fewer cores than ranks. Processor time of the busiest
rank tells who does more work, on a machine that others use too.

Run: python benchmarks/axes.py --ranks 2 --rounds 20 --groups tensor pipeline context
Exit code 1: a ratio is above its bound.
"""

import statistics
import tempfile
from typing import Any, NamedTuple

from ratios import Ratio, command_line, end, mark, milliseconds
from rich.console import Console
from rich.table import Table
from work import DATA, MODEL, race
from work_ring import one_document

from sandbox.runtime import launch

PLAIN = "one process"
NAMES = ["tensor", "pipeline", "context"]


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
    parser = command_line(__doc__, ranks=2, rounds=20, json=True)
    parser.add_argument("--sequence", type=int, default=4096, help="columns in the group context (default: 4096)")
    parser.add_argument("--groups", nargs="+", default=NAMES, choices=NAMES, help="what to measure (default: all)")
    args = parser.parse_args()
    rows, good = [], True
    with tempfile.TemporaryDirectory() as folder:
        choices = groups(args.ranks, args.sequence, str(one_document(folder)))
        for name in args.groups:
            group = choices[name]
            racers = {PLAIN: {}, **group.racers}
            measured = launch(args.ranks, race, racers, group.common, args.rounds, timeout=600)[0]
            table = Table("ranks", name, "ms", "processor ms", "of one process", "collectives", "us each", box=None)
            whole = measured[PLAIN].seconds
            for racer, (seconds, used, count) in measured.items():
                ratio = Ratio.of(seconds, whole)
                extra = statistics.median(a - b / args.ranks for a, b in zip(seconds, whole, strict=True))
                ours = not racer.startswith((PLAIN, "torch"))  # only ours are counted
                counted = (str(count), f"{extra / count * 1e6:.0f}") if ours else ("-", "-")
                times, among = (milliseconds(seconds), milliseconds(used)), f"{ratio.middle:.3f} ({ratio.quartiles()})"
                table.add_row(str(args.ranks), racer, *times, among, *counted)
                row = {"ranks": args.ranks, "racer": racer, "s": statistics.median(seconds)}
                rows.append(row | {"of_one": ratio.middle})
            Console(width=120).print(table)
            for mine, theirs, bound in group.pairs:
                ratio = Ratio.of(measured[mine].seconds, measured[theirs].seconds)
                work = Ratio.of(measured[mine].processor, measured[theirs].processor).middle
                fits = ratio.middle <= bound
                good &= fits
                among = f"{ratio.quartiles()}; bound {bound}"
                print(f"{mark(fits)} {mine} / {theirs}: {ratio.middle:.3f} ({among}), processor {work:.3f}")
                row = {"ranks": args.ranks, "ours": mine, "theirs": theirs, "ratio": ratio.middle, "bound": bound}
                rows.append(row | {"processor_ratio": work})
    end(good, rows, args.json)


if __name__ == "__main__":
    main()
