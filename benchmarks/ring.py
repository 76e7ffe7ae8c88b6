"""What zigzag is worth: step time of ring attention with its columns in zigzag against contiguous, in one run.

Of two ranks with contiguous columns the last computes three quarters of the scores; in zigzag each computes half. So
where attention is all there is, the ratio goes to 2/3. The text is one document, for documents cut the work themselves.
Processor time of the busiest rank shows the same on a machine that others use too, where a step waits for a core.

Run: python benchmarks/ring.py --sequence 4096 --rounds 10
Exit code 1: the ratio of step times is above its bound.
"""

import statistics
import tempfile
from typing import Any

from ratios import Ratio, command_line, end, milliseconds
from work import race
from work_ring import one_document

from sandbox.runtime import launch

MODEL = {"layers": 4, "width": 64, "heads": 2}
BOUND = 0.95


def main() -> None:
    parser = command_line(__doc__, ranks=2, rounds=10, json=True)
    parser.add_argument("--sequence", type=int, default=4096, help="columns (default: 4096)")
    args = parser.parse_args()
    racers = {order: {"mesh": {"cp": {"degree": args.ranks, "order": order}}} for order in ("zigzag", "contiguous")}
    train = {"batch": 1, "optimizer": "sgd_momentum", "lr": 0.01}
    with tempfile.TemporaryDirectory() as folder:
        data = {"sequence": args.sequence, "files": [str(one_document(folder))]}
        common = {"model": MODEL, "data": data, "train": train}
        measured = launch(args.ranks, race, racers, common, args.rounds, timeout=600)[0]
    row: dict[str, Any] = {"ranks": args.ranks, "sequence": args.sequence, "bound": BOUND}
    print(f"{args.ranks} ranks, {args.sequence} columns (bound {BOUND})")
    for what, field in (("step", "seconds"), ("processor", "processor")):
        zigzag, contiguous = (getattr(measured[order], field) for order in racers)
        ratio = Ratio.of(zigzag, contiguous)
        times = f"zigzag {milliseconds(zigzag)} ms, contiguous {milliseconds(contiguous)} ms"
        print(f"{what:9}  {times}, ratio {ratio.middle:.3f} (quartiles {ratio.quartiles()})")
        medians = {f"{what}_zigzag_s": statistics.median(zigzag), f"{what}_contiguous_s": statistics.median(contiguous)}
        row |= medians | {f"{what}_ratio": ratio.middle}
    end(row["step_ratio"] <= BOUND, row, args.json)


if __name__ == "__main__":
    main()
