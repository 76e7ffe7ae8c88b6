"""What the benchmarks have in common: a command line, ratios of times in the same rounds, and how they end."""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

__all__ = ["Ratio", "command_line", "end", "end_with", "exceeds", "mark", "milliseconds", "tell"]


def command_line(about: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with those options of all benchmarks that have a default here.

    `json=True`: results can be written to a file.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, meaning in {
        "ranks": "processes",
        "rounds": "turns that count, of each trainer",
        "rows": "rows of the batch on each rank",
    }.items():
        if name in defaults:
            several = {"nargs": "+"} if isinstance(defaults[name], list) else {}
            told = f"{meaning} (default: {' '.join(map(str, _list(defaults[name])))})"
            parser.add_argument(f"--{name}", type=int, default=defaults[name], help=told, **several)
    if defaults.get("json"):
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to it")
    return parser


class Ratio(NamedTuple):
    """Of two times in the same rounds, the median of their ratios, and the quartiles around it."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        """The times of each round; at least two rounds."""
        return cls(*statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4, method="inclusive"))

    def quartiles(self, between: str = " to ", digits: int = 3) -> str:
        """`0.970 to 1.002`."""
        return f"{self.low:.{digits}f}{between}{self.high:.{digits}f}"


def exceeds(ours: Sequence[float], theirs: Sequence[float], bound: float) -> bool:
    """Whether the ratio of two times is above `bound`, and not by chance: a sign test of the rounds, at one in forty.

    Of two that are alike, half of all runs find a median above 1.
    """
    above = sum(a > bound * b for a, b in zip(ours, theirs, strict=True))
    as_many = sum(math.comb(len(ours), count) for count in range(above, len(ours) + 1))
    return as_many <= 2.0 ** len(ours) / 40


def mark(good: bool) -> str:
    return "✓" if good else "✗"


def milliseconds(seconds: Sequence[float], digits: int = 0) -> str:
    """The median, for people."""
    return f"{statistics.median(seconds) * 1e3:.{digits}f}"


def tell(what: str, ours: tuple[str, Sequence[float]], theirs: tuple[str, Sequence[float]], bound: float) -> bool:
    """Tell how two times compare, each with its name -> whether the ratio is within `bound`."""
    ratio = Ratio.of(ours[1], theirs[1])
    times = ", ".join(f"{name} {milliseconds(seconds, 1)} ms" for name, seconds in (ours, theirs))
    print(f"{what}: {times}, ratio {ratio.middle:.3f} (quartiles {ratio.quartiles()}; bound {bound})")
    return ratio.middle <= bound


def end_with(
    what: str, ours: tuple[str, Sequence[float]], theirs: tuple[str, Sequence[float]], bound: float
) -> NoReturn:
    """Tell how two times compare, and end: with 1 if the ratio is above `bound`."""
    end(tell(what, ours, theirs, bound))


def end(good: bool, results: Any = None, file: Path | None = None) -> NoReturn:
    """Write the results, if there is a file for them; exit with 1 if something is above its bound."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(not good)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
