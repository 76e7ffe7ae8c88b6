"""What it is worth that ranks on the CPU take turns, and long ones, each in the same ranks.

A small all_to_all, with and without: a thread that a message wakes does not take the core from the one that is about to
send the next (Linux's SCHED_BATCH). A step of fsdp, in turns of 0.1 s and in the kernel's own of some ms.

Run: python benchmarks/turns.py --ranks 4
Exit code 1: a ratio is above its bound.
"""

from ratios import command_line, end, tell
from work import exchanges_in_turns, steps_in_turns

from sandbox.runtime import launch

BOUND = 1.0
CALLS = 50
ROWS = 4


def main() -> None:
    args = command_line(__doc__, ranks=4, rounds=20).parse_args()
    turns, none = launch(args.ranks, exchanges_in_turns, CALLS, args.rounds, timeout=600)[0]
    small = tell(f"{CALLS} small all_to_all on {args.ranks} ranks", ("in turns", turns), ("without", none), BOUND)
    long, short = launch(args.ranks, steps_in_turns, ROWS, args.rounds, timeout=600)[0]
    step = tell(f"a step of fsdp on {args.ranks} ranks", ("in long turns", long), ("in short ones", short), BOUND)
    end(small and step)


if __name__ == "__main__":
    main()
