"""What noting the order of collectives costs a step: processor time with and without, turn by turn in the same ranks.

python benchmarks/desync_overhead.py --strategy fsdp
"""

import argparse
import statistics
import sys

from work import noted_and_not

from sandbox.runtime import launch

BOUND = 1.02


def main() -> None:
    """Print the ratio; exit 1 if it is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch on each rank")
    parser.add_argument("--strategy", default="fsdp")
    args = parser.parse_args()
    job = (args.strategy, args.rows * args.ranks, args.rounds)
    noted, plain, one, starts = launch(args.ranks, noted_and_not, *job, timeout=600)[0]
    low, ratio, high = statistics.quantiles([a / b for a, b in zip(noted, plain, strict=True)], n=4)
    mean = statistics.median(plain)
    print(
        f"{args.strategy} on {args.ranks} ranks: ratio {ratio:.4f} (quartiles {low:.4f} to {high:.4f}; bound {BOUND}); "
        f"a note costs {one * 1e6:.2f} us, {starts} of them a step of {mean * 1e3:.1f} ms: {starts * one / mean:.5f}"
    )
    sys.exit(ratio > BOUND)


if __name__ == "__main__":
    main()
