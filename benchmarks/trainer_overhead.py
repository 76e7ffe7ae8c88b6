"""What the trainer costs over a loop written by hand: torch's DDP in both, taking turns in the same ranks.

Run: python benchmarks/trainer_overhead.py --ranks 2
Exit code 1: the ratio is above its bound.
"""

from ratios import command_line, end_with
from work import trainer_and_loop

from sandbox.runtime import launch

BOUND = 1.02


def main() -> None:
    args = command_line(__doc__, ranks=2, rounds=30, rows=4).parse_args()
    ours, theirs = launch(args.ranks, trainer_and_loop, args.rows * args.ranks, args.rounds, timeout=600)[0]
    end_with(f"{args.ranks} ranks", ("trainer", ours), ("by hand", theirs), BOUND)


if __name__ == "__main__":
    main()
