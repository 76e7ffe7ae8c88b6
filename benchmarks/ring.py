"""What zigzag is worth: step time of ring attention with its columns in zigzag against contiguous, in one run.

Of two ranks with contiguous columns the last computes three quarters of the scores; in zigzag each computes half. So
where attention is all there is, the ratio goes to 2/3. The text is one document, for documents cut the work themselves.
Processor time of the busiest rank shows the same on a machine that others use too, where a step waits for a core.

python benchmarks/ring.py --sequence 4096 --rounds 10
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from work_ring import orders

from sandbox.runtime import launch

BOUND = 0.95


def main() -> None:
    """Print the ratio; exit 1 if it is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "topics.txt"
        file.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
        kinds = ["zigzag", "contiguous"]
        measured = launch(args.ranks, orders, kinds, args.sequence, file, args.rounds, timeout=600)[0]
    row: dict[str, float] = {"ranks": args.ranks, "sequence": args.sequence, "bound": BOUND}
    print(f"{args.ranks} ranks, {args.sequence} columns (bound {BOUND})")
    for what, (zigzag, contiguous) in zip(("step", "processor"), measured, strict=True):
        low, ratio, high = statistics.quantiles([a / b for a, b in zip(zigzag, contiguous, strict=True)], n=4)
        first, second = statistics.median(zigzag), statistics.median(contiguous)
        times = f"zigzag {first * 1e3:.0f} ms, contiguous {second * 1e3:.0f} ms"
        print(f"{what:9}  {times}, ratio {ratio:.3f} (quartiles {low:.3f} to {high:.3f})")
        row |= {f"{what}_zigzag_s": first, f"{what}_contiguous_s": second, f"{what}_ratio": ratio}
    if args.json:
        args.json.write_text(json.dumps(row, indent=1), encoding="utf-8")
    sys.exit(row["step_ratio"] > BOUND)


if __name__ == "__main__":
    main()
