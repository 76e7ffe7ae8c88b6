"""Bubbles of the pipeline's schedules, measured with stages that sleep, against the schedules' own table.

Sleeping takes no processor, so this can be run with more ranks than cores, and what is left is the schedule itself: how
long ranks wait for one another, and how many microbatches each keeps for backward.

Run: python benchmarks/bubble.py --ranks 4 --microbatches 8
Exit code 1: a bubble is off by more than 0.05, or a rank keeps other than it should.
"""

from collections.abc import Sequence

from ratios import command_line, end, mark
from rich.console import Console
from rich.table import Table

from sandbox.measure.naps import measure
from sandbox.schedules import SCHEDULES, bubble, peaks

BOUND = 0.05


def main() -> None:
    parser = command_line(__doc__, ranks=4)
    parser.add_argument("--microbatches", type=int, default=8, help="of a step (default: 8)")
    parser.add_argument("--steps", type=int, default=3, help="the one with the smallest bubble counts (default: 3)")
    parser.add_argument("--sleep", type=float, default=0.03, help="seconds that an action takes (default: 0.03)")
    args = parser.parse_args()
    if args.ranks < 3:
        parser.error("--ranks: at least 3, for embedding, one layer and head are stages of their own")
    table = Table("schedule", "bubble, theory", "measured", "kept by each rank, theory", "measured", "", box=None)
    table.title = f"{args.ranks} ranks, {args.microbatches} microbatches, F = B = W = {1e3 * args.sleep:g} ms"
    good = True
    for name in SCHEDULES:
        schedule, found, kept = measure(name, args.ranks, args.microbatches, args.sleep, args.steps)
        theory, most = bubble(schedule), peaks(schedule)
        fits = abs(found - theory) <= BOUND and kept == most
        table.add_row(name, f"{theory:.1%}", f"{found:.1%}", words(most), words(kept), mark(fits))
        good &= fits
    Console(width=120).print(table)
    end(good)


def words(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


if __name__ == "__main__":
    main()
