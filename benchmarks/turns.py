"""What it is worth that ranks on the CPU take turns: a small all_to_all, with and without, in the same ranks.

A thread that a message wakes does not take the core from the one that is about to send the next (Linux's SCHED_BATCH).

Run: python benchmarks/turns.py --ranks 4
Exit code 1: the ratio is above its bound.
"""

from ratios import command_line, end_with
from work import turns_and_none

from sandbox.runtime import launch

BOUND = 1.0
CALLS = 50


def main() -> None:
    args = command_line(__doc__, ranks=4, rounds=20).parse_args()
    turns, none = launch(args.ranks, turns_and_none, CALLS, args.rounds, timeout=600)[0]
    end_with(f"{CALLS} small all_to_all on {args.ranks} ranks", ("in turns", turns), ("without", none), BOUND)


if __name__ == "__main__":
    main()
