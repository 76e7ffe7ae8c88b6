"""What the trainer costs over a loop written by hand: torch's DDP in both, taking turns in the same ranks.

python benchmarks/trainer_overhead.py --ranks 2
"""

import argparse
import statistics
import sys

from work import trainer_and_loop

from sandbox.runtime import launch

BOUND = 1.02


def main() -> None:
    """Print the ratio; exit 1 if it is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch on each rank")
    args = parser.parse_args()
    ours, theirs = launch(args.ranks, trainer_and_loop, args.rows * args.ranks, args.rounds, timeout=600)[0]
    low, ratio, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    mine, hand = statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3
    print(
        f"{args.ranks} ranks: trainer {mine:.1f} ms, by hand {hand:.1f} ms, "
        f"ratio {ratio:.3f} (quartiles {low:.3f} to {high:.3f}; bound {BOUND})"
    )
    sys.exit(ratio > BOUND)


if __name__ == "__main__":
    main()
