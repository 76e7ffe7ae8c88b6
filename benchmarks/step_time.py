"""Step time of native strategies against torch's own, as ratios within one run.

Trainers that are compared live in the same ranks and take turns, one step each, so the machine's noise falls on all
alike; no others live there, for a step's time depends on the memory that the step before it left. A step's time is that
of the slowest rank; a ratio is the median over rounds of the two times in the same round.

A bound of 1 says "not slower", and of two that are alike half of all runs find a ratio above 1: there rounds decide
whether chance explains it. How much chance is, torch's DDP against a second one of its own tells, in the same race.

How many tokens a rank computes between its messages decides how much a strategy can matter: of 128 (one row), half of a
step on 4 ranks is messages and copies; of 512, a fifth or less where a core multiplies slowly. So both are measured.

Run: python benchmarks/step_time.py --ranks 2 4 --rows 1 4 --rounds 20
Marks: ✓ within the bound, ≈ above 1 in no more rounds than chance explains, ✗ above it. Exit code 1: there is an ✗.
"""

import statistics
from itertools import product
from typing import Any

from ratios import Ratio, command_line, end, exceeds, mark, milliseconds
from rich.console import Console
from rich.table import Table
from work import DATA, MODEL, race, race_interrupting

from sandbox.runtime import launch

RACES = {
    "torch ddp": {"native ddp": 1.00, "torch ddp again": 1.00},
    "torch fsdp": {"native fsdp": 0.90, "native zero2": 0.90, "native zero3": 0.90},
    "torch zero1": {"native zero1": 1.00},
}
"""What is raced against -> who races, and the most that the ratio of each may be."""


def racer(name: str, ranks: int) -> dict[str, Any]:
    """Of `engine strategy`, and whatever follows, the sections of a config that are its own."""
    engine, strategy, *_ = name.split()
    return {"engine": engine, "mesh": {"dp": {"degree": ranks, "strategy": strategy}}}


def main() -> None:
    parser = command_line(__doc__, ranks=[2, 4], rounds=20, rows=[1, 4], json=True)
    parser.add_argument("--interrupt", action="store_true", help="let threads interrupt one another, as Linux does")
    args = parser.parse_args()
    racing = race_interrupting if args.interrupt else race
    heads = ("ranks", "tokens of each", "ours", "theirs", "ours ms", "theirs ms", "ratio", "quartiles", "bound")
    table = Table(*heads, box=None)
    rows, good = [], True
    for ranks, rows_each, (theirs, bounds) in product(args.ranks, args.rows, RACES.items()):
        tokens = rows_each * DATA["sequence"]
        common = {"model": MODEL, "data": DATA, "train": {"batch": rows_each * ranks}}
        racers = {name: racer(name, ranks) for name in (theirs, *bounds)}
        measured = launch(ranks, racing, racers, common, args.rounds, timeout=600)[0]
        for ours, bound in bounds.items():
            a, b = measured[ours].seconds, measured[theirs].seconds
            ratio = Ratio.of(a, b)
            within = ratio.middle <= bound
            above = not within and (bound < 1 or exceeds(a, b, bound))
            good &= not above
            row = {"ranks": ranks, "tokens": tokens, "ours": ours, "theirs": theirs, "ratio": ratio.middle}
            rows.append(row | {"ours_s": statistics.median(a), "theirs_s": statistics.median(b), "bound": bound})
            figures = (milliseconds(a), milliseconds(b), f"{ratio.middle:.3f}", ratio.quartiles("-"))
            verdict = "≈" if not within and not above else mark(within)
            table.add_row(str(ranks), str(tokens), ours, theirs, *figures, f"{bound:.2f} {verdict}")
    Console(width=120).print(table)
    end(good, rows, args.json)


if __name__ == "__main__":
    main()
