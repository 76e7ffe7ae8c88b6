"""Step time of native strategies against torch's own, as ratios within one run.

All trainers live in the same ranks and take turns, one step each, so the machine's noise falls on all alike. A step's
time is that of the slowest rank; a ratio is the median over rounds of the two times in the same round.

Run: python benchmarks/step_time.py --ranks 2 4 --rounds 20
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from work import turns

from sandbox.runtime import launch

PAIRS = [  # ours, theirs, the most that the ratio may be
    (("native", {"strategy": "ddp"}), ("torch", {"strategy": "ddp"}), 1.00),
    (("native", {"strategy": "fsdp"}), ("torch", {"strategy": "fsdp"}), 0.90),
    (("native", {"strategy": "zero2"}), ("torch", {"strategy": "fsdp"}), 0.90),
    (("native", {"strategy": "zero3"}), ("torch", {"strategy": "fsdp"}), 0.90),
    (("native", {"strategy": "zero1"}), ("torch", {"strategy": "zero1"}), 1.00),
]


def main() -> None:
    """Print the table; exit 1 if a ratio is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch on each rank")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = Table("ranks", "ours", "theirs", "ours ms", "theirs ms", "ratio", "quartiles", "bound", box=None)
    rows, good = [], True
    kinds = [("native", {"strategy": name}) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp")]
    kinds += [("torch", {"strategy": name}) for name in ("ddp", "zero1", "fsdp")]
    for ranks in args.ranks:
        times = launch(ranks, turns, kinds, args.rows * ranks, args.rounds, timeout=600)[0]
        for ours, theirs, bound in PAIRS:
            a, b = times[kinds.index(ours)], times[kinds.index(theirs)]
            ratios = [x / y for x, y in zip(a, b, strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            good &= ratio <= bound
            row = {"ranks": ranks, "ours": ours[1]["strategy"], "theirs": theirs[1]["strategy"], "ratio": ratio}
            rows.append(row | {"ours_s": statistics.median(a), "theirs_s": statistics.median(b), "bound": bound})
            mark = "✓" if ratio <= bound else "✗"
            figures = (f"{statistics.median(a) * 1e3:.0f}", f"{statistics.median(b) * 1e3:.0f}", f"{ratio:.3f}")
            table.add_row(
                str(ranks),
                ours[1]["strategy"],
                theirs[1]["strategy"],
                *figures,
                f"{low:.3f}-{high:.3f}",
                f"{bound} {mark}",
            )
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    sys.exit(not good)


if __name__ == "__main__":
    main()
