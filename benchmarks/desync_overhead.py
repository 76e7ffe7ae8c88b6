"""What noting the order of collectives costs a step: processor time with and without, turn by turn in the same ranks.

Every rank notes on a board which collective it starts, so that a hang can be explained (docs/faults-and-restarts.md).
Under torchrun each puts its board into the store once a second, and the first reads all: what that costs the first.

Run: python benchmarks/desync_overhead.py --strategy fsdp
Exit code 1: the ratio is above its bound.
"""

import statistics

from ratios import Ratio, command_line, end
from work import noted_and_not

from sandbox.runtime import launch

BOUND = 1.02


def main() -> None:
    parser = command_line(__doc__, ranks=2, rounds=30, rows=4)
    parser.add_argument("--strategy", default="fsdp", help="of engine native (default: fsdp)")
    args = parser.parse_args()
    job = (args.strategy, args.rows * args.ranks, args.rounds)
    noted, plain, one, starts, look = launch(args.ranks, noted_and_not, *job, timeout=600)[0]
    ratio, mean = Ratio.of(noted, plain), statistics.median(plain)
    print(
        f"{args.strategy} on {args.ranks} ranks: ratio {ratio.middle:.4f} (quartiles {ratio.quartiles(digits=4)}; "
        f"bound {BOUND}); a note costs {one * 1e6:.2f} us, {starts} of them a step of {mean * 1e3:.1f} ms: "
        f"{starts * one / mean:.5f}\nunder torchrun, a look a second at the boards of all costs {look * 1e3:.2f} ms"
    )
    end(ratio.middle + look <= BOUND)


if __name__ == "__main__":
    main()
