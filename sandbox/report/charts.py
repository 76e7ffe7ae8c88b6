"""The charts of the page as numbers: where each piece lies, in percent of the chart, what colour, and what it says.

Bars of bytes held and sent, a timeline of one step, curves of a training. The template draws them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sandbox.report import words
from sandbox.report.cases import held
from sandbox.report.record import RunRecord
from sandbox.verdict import Amount, Measured, Span

__all__ = ["kinds", "memory", "timeline", "traffic", "training"]

KINDS = ("forward", "backward", "optimizer", "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send", "recv")
"""What has a colour of its own."""


class Bar(NamedTuple):
    """A piece of a bar, in percent of the chart's width."""

    kind: str
    start: float
    width: float
    title: str


def _bars(values: dict[str, int], scale: float) -> list[Bar]:
    """Pieces that follow one another."""
    bars, start = [], 0.0
    for kind, value in values.items():
        width = 100 * value / scale
        bars.append(Bar(kind, start, width, f"{kind} {words.size(value)}"))
        start += width
    return bars


class Rank(NamedTuple):
    """Memory of one rank: what was measured, and what theory says."""

    measured: list[Bar]
    predicted: list[Bar]
    total: int


def memory(cases: Sequence[Measured]) -> list[tuple[Measured, list[Rank]]]:
    """All cases on one scale, so that what sharding saves is seen."""
    by_case = [(case, held(case)) for case in cases]
    scale = max((sum(side.values()) for _, ranks in by_case for rank in ranks for side in rank), default=0) or 1
    return [
        (
            case,
            [
                Rank(_bars(rank.measured, scale), _bars(rank.predicted, scale), sum(rank.measured.values()))
                for rank in ranks
            ],
        )
        for case, ranks in by_case
    ]


class Sent(NamedTuple):
    """Bytes of one collective, by the rank that sends most; widths in percent."""

    name: str
    kind: str
    measured: int
    predicted: int
    measured_width: float
    predicted_width: float
    factor: str


def traffic(cases: Sequence[Measured]) -> list[tuple[Measured, list[Sent]]]:
    """All cases on one scale."""
    amounts = [amount for case in cases for amount in case.traffic.values()]
    scale = max((value for a in amounts for value in (*a.measured, *a.predicted)), default=0) or 1

    def sent(name: str, amount: Amount) -> Sent:
        one, other = max(amount.measured, default=0), max(amount.predicted, default=0)
        return Sent(name, _kind(name), one, other, 100 * one / scale, 100 * other / scale, words.factor([amount]))

    return [(case, [sent(name, amount) for name, amount in case.traffic.items()]) for case in cases]


class Timeline(NamedTuple):
    """One step of one case: by rank, the pieces of its two lanes; ticks in milliseconds. No ranks: it was not timed."""

    case: Measured
    kinds: list[str]
    ranks: list[tuple[list[Bar], list[Bar]]]
    ticks: list[tuple[float, str]]


def timeline(case: Measured) -> Timeline:
    """The step of `case` that was timed: from 0 to the end of its last span is 100 %."""
    length = max((span.end for spans in case.timeline for span in spans), default=0.0) or 1.0
    ranks = []
    for spans in case.timeline if any(case.timeline) else []:
        compute, collective = (
            [
                Bar(
                    _kind(span.name),
                    100 * span.start / length,
                    max(100 * (span.end - span.start) / length, 0.15),  # a hair's breadth at least, to be seen
                    f"{span.name}: {1e3 * span.start:.2f} to {1e3 * span.end:.2f} ms"
                    + (f", {words.size(span.bytes)}" if span.bytes else ""),
                )
                for span in _joined([s for s in spans if s.lane == lane], length)
            ]
            for lane in ("compute", "collective")
        )
        ranks.append((compute, collective))
    drawn = kinds(bar.kind for rank in ranks for lane in rank for bar in lane)
    ticks = [(100 * tick / (1e3 * length), f"{tick:g}") for tick in _ticks(0, 1e3 * length)]
    return Timeline(case, drawn, ranks, ticks)


def _kind(name: str) -> str:
    """`all_reduce dp` -> `all_reduce`, which has a colour."""
    first = name.partition(" ")[0]
    return first if first in KINDS else "other"


def kinds(names: Iterable[str]) -> list[str]:
    """The kinds of what has those names, such as `all_reduce dp`, in the order of the legend."""
    found = set(map(_kind, names))
    return [kind for kind in (*KINDS, "other") if kind in found]


def _joined(spans: Iterable[Span], length: float) -> list[Span]:
    """Slivers of one name, too near one another to be told apart, made one: thousands would weigh the page down."""
    joined: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        last = joined[-1] if joined else span
        near, short = span.start - last.end < length / 1000, span.end - last.start < length / 100
        if joined and last.name == span.name and near and short:
            joined[-1] = last.model_copy(update={"end": max(last.end, span.end), "bytes": last.bytes + span.bytes})
        else:
            joined.append(span)
    return joined


class Curve(NamedTuple):
    """A line, as SVG points in a square of 100, y downwards."""

    kind: str
    points: str


class Plot(NamedTuple):
    """Curves over steps. Ticks and levels are (position in percent, text)."""

    label: str
    curves: list[Curve]
    dots: list[tuple[float, float, str]]
    levels: list[tuple[float, str]]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


class Training(NamedTuple):
    """A run and its plots."""

    run: RunRecord
    gap: float | None  # largest |loss - reference|
    plots: list[Plot]


def training(run: RunRecord) -> Training:
    """The loss of a run over the unsharded one's, and the norm of its gradient."""
    reference = dict(run.reference)
    gaps = [abs(loss - reference[step]) for step, loss in run.losses if step in reference]
    levels = [] if run.unigram_entropy is None else [(run.unigram_entropy, "unigram entropy")]
    plots = [_plot("loss, nats a token", {"reference": run.reference, "run": run.losses}, run.validation, levels)]
    if run.grad_norm:
        plots.append(_plot("gradient norm", {"run": run.grad_norm}, [], []))
    return Training(run, max(gaps, default=None), plots)


Points = Sequence[tuple[int, float]]


def _plot(label: str, curves: dict[str, Points], dots: Points, levels: Sequence[tuple[float, str]]) -> Plot:
    curves = {kind: [p for p in points if math.isfinite(p[1])] for kind, points in curves.items()}
    points = [*(p for curve in curves.values() for p in curve), *dots]
    steps = [step for step, _ in points]
    values = [value for _, value in points] + [value for value, _ in levels]
    left, right = min(steps, default=0), max(steps, default=1)
    low, high = min(values, default=0), max(values, default=1)
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low) or 1

    def x(step: float) -> float:
        return 100 * (step - left) / ((right - left) or 1)

    def y(value: float) -> float:
        return 100 * (high - value) / ((high - low) or 1)

    return Plot(
        label,
        [Curve(kind, " ".join(f"{x(s):.2f},{y(v):.2f}" for s, v in curve)) for kind, curve in curves.items() if curve],
        [(x(step), y(value), f"step {step}: validation loss {value:.4f}") for step, value in dots],
        [(y(value), f"{text} {value:.2f}") for value, text in levels],
        [(x(tick), f"{tick:g}") for tick in _ticks(left, right)],
        [(y(tick), f"{tick:g}") for tick in _ticks(low, high)],
    )


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, about `count`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
