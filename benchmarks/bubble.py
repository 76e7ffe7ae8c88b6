"""Bubbles of the pipeline's schedules, measured with stages that sleep, against the schedules' own table.

python benchmarks/bubble.py --ranks 4 --microbatches 8
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sandbox.measure.naps import measure
from sandbox.schedules import SCHEDULES, bubble, peaks

BOUND = 0.05


def main() -> None:
    """Print the table; exit 1 if a bubble is off by more than the bound, or a rank keeps other than it should."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of which the one with the smallest bubble counts")
    parser.add_argument("--sleep", type=float, default=0.03, help="seconds that an action of one stage takes")
    args = parser.parse_args()
    table = Table("schedule", "bubble, theory", "measured", "kept by each rank, theory", "measured", "", box=None)
    table.title = f"{args.ranks} ranks, {args.microbatches} microbatches, F = B = W = {1e3 * args.sleep:g} ms"
    good = True
    for name in SCHEDULES:
        schedule, found, kept = measure(name, args.ranks, args.microbatches, args.sleep, args.steps)
        theory, most = bubble(schedule), peaks(schedule)
        fits = abs(found - theory) <= BOUND and kept == most
        table.add_row(name, f"{theory:.1%}", f"{found:.1%}", words(most), words(kept), "✓" if fits else "✗")
        good &= fits
    Console(width=120).print(table)
    sys.exit(not good)


def words(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


if __name__ == "__main__":
    main()
