"""The verdicts as one HTML page: no script, nothing fetched, light and dark, readable on a telephone.

Charts are plain SVG with horizontal positions in percent, so that they stretch while their text does not, and
with colours from the page's style, so that one drawing serves both themes.
"""

import math
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from sandbox.errors import SandboxError
from sandbox.report import charts, words
from sandbox.report.cases import PARTS, drawn, groups
from sandbox.report.links import SlowLink
from sandbox.report.output import output
from sandbox.report.record import RunRecord
from sandbox.verdict import Measured, Verdict, Verdicts

__all__ = ["write"]

HERE = Path(__file__).parent
LOWEST = -18  # log10 of the smallest error on the axis


def write(
    path: Path,
    verdicts: Verdicts,
    *,
    runs: Sequence[RunRecord] = (),
    pictures: Sequence[tuple[Measured, str]] = (),
    links: Sequence[SlowLink] = (),
    when: date | None = None,
) -> None:
    """Write the page about `verdicts`, and about `runs` and `links` if any, to `path`. `when` is today by default.

    `pictures` are cases, each with an SVG of what its ranks hold and do.

    Raises SandboxError where Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise SandboxError(
            "The report needs Jinja2. Install it: pip install 'distributed-training-sandbox[report]'"
        ) from None
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"error": words.error, "size": words.size, "duration": words.duration, "at": _position}
    cases, measured = verdicts.cases, [run.measured for run in runs if run.measured]
    sent = drawn(measured, cases, lambda case: bool(case.traffic))
    held = drawn(measured, cases, lambda case: bool(case.memory))
    timed = drawn(measured, cases, lambda case: any(case.timeline) or bool(case.unmeasured))
    page = environment.get_template("page.html").render(
        verdicts=verdicts,
        when=when or date.today(),
        words=words,
        groups=groups(cases),
        facts=[*_facts(cases)] if cases else [*_of_training(runs)],
        kinds=charts.kinds(name for case in sent for name in case.traffic),
        ticks=[0.0, *(10.0**power for power in range(LOWEST, 1, 3))],
        parts=PARTS,
        memory=charts.memory(held),
        traffic=charts.traffic(sent),
        timelines=[charts.timeline(case) for case in timed],
        pictures=pictures,
        links=links,
        runs=[charts.training(run) for run in runs if len(run.losses) > 1],
    )
    with output(path) as file:
        file.write_text(page, encoding="utf-8")


def _error(case: Verdict) -> float:
    return words.worst([*case.gradients, *case.parameters])


class Fact(NamedTuple):
    """A figure to be read first."""

    figure: str
    text: str


def _facts(cases: Sequence[Verdict]) -> Iterator[Fact]:
    held = [case for case in cases if case.status == "held"]
    for dtype in dict.fromkeys(case.dtype for case in held):
        same = [case for case in held if case.dtype == dtype]
        nearest = max(same, key=lambda case: _error(case) / (case.tolerance or 1e-300))
        allowed = f"{nearest.tolerance:.0e}".replace("-", "\N{NON-BREAKING HYPHEN}")
        yield Fact(
            words.error(_error(nearest)), f"of {allowed} allowed: the largest error of the {dtype} cases that held"
        )
    for text, amounts in (
        ("cases that held send exactly the bytes of theory", [list(case.traffic.values()) for case in held]),
        ("cases that held keep exactly the bytes of theory in memory", [list(case.memory.values()) for case in held]),
    ):
        compared = [words.factor(case) for case in amounts if case]
        if compared:
            yield Fact(f"{compared.count('1')} of {len(compared)}", text)


def _of_training(runs: Sequence[RunRecord]) -> Iterator[Fact]:
    learned = [(run.validation[-1][1], run) for run in runs if run.validation]
    if learned:
        loss, run = min(learned, key=lambda one: one[0])
        beside = "" if run.unigram_entropy is None else f"; counting tokens would give {run.unigram_entropy:.2f}"
        yield Fact(f"{loss:.3f}", f"nats a token on held-out text, after {run.validation[-1][0]} steps{beside}")
    measured = [run.measured for run in runs if run.measured]
    for text, amounts in (
        ("bytes sent in a step, over those of theory", [a for one in measured for a in one.traffic.values()]),
        ("bytes held after a step, over those of theory", [a for one in measured for a in one.memory.values()]),
    ):
        if amounts:
            yield Fact(f"{words.factor(amounts)} \N{MULTIPLICATION SIGN}", text)
    if peak := max((bytes_ for one in measured for bytes_ in one.peak), default=0):
        yield Fact(words.size(peak), "at most in tensors on a rank, within a step")


def _position(value: float) -> str:
    """Of an error on the axis, in percent: zero at its left end, then logarithmic from 1e-18 to 1."""
    if value == 0:
        return "1.5"
    power = 0.0 if math.isnan(value) or value >= 1 else max(math.log10(value), LOWEST)
    return f"{7 + 91 * (power - LOWEST) / -LOWEST:.2f}"
