"""Which cases to draw, and what they hold in memory: shared by the page and the figure."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from sandbox.report import words
from sandbox.verdict import Amount, Measured, Verdict

__all__ = ["PARTS", "Group", "Held", "drawn", "groups", "held", "representatives"]

PARTS = ("parameters", "gradients", "optimizer", "activations")
"""What memory is for. Theory has nothing on the last: it is what the peak has beyond the others."""

MANY = 20
"""Strategies, alone and composed, of which each has a line of its own in a figure."""


class Group(NamedTuple):
    """Cases of one strategy on one engine."""

    strategy: str
    engine: str
    cases: list[Verdict]


class Held(NamedTuple):
    """Bytes on one rank, by part."""

    measured: dict[str, int]
    predicted: dict[str, int]


def groups(cases: Iterable[Verdict]) -> list[Group]:
    """Strategies in the order of their first case, engines within. Of many compositions, those of as many axes."""
    cases = list(cases)
    many = len({case.strategy for case in cases}) > MANY

    def name(case: Verdict) -> str:
        axes = case.mesh.count(", ") + 1
        return f"{axes} axes" if many and axes > 1 else case.strategy

    engines = dict.fromkeys(case.engine for case in cases)
    keys = [(strategy, engine) for strategy in dict.fromkeys(map(name, cases)) for engine in engines]
    found = [Group(*key, [case for case in cases if (name(case), case.engine) == key]) for key in keys]
    return [group for group in found if group.cases]


def representatives(cases: Iterable[Verdict], having: Callable[[Measured], bool]) -> list[Verdict]:
    """Of every strategy and engine the case on most ranks: charts of all would say little more."""
    drawn = groups(case for case in cases if case.status in ("held", "mismatch") and having(case))
    return [max(group.cases, key=lambda case: (case.status == "held", case.world)) for group in drawn]


def drawn(runs: Sequence[Measured], cases: Iterable[Verdict], having: Callable[[Measured], bool]) -> list[Measured]:
    """All `runs`, and representatives of what they are not of."""
    taken = {(run.strategy, run.engine) for run in runs}
    others = (case for case in cases if (case.strategy, case.engine) not in taken)
    return [*filter(having, runs), *representatives(others, having)]


def held(case: Measured) -> list[Held]:
    """What each rank holds."""
    ranks = [Held({}, {}) for _ in range(case.world)]
    for part in PARTS[:-1]:
        amount = case.memory.get(part, Amount(predicted=[0], measured=[0]))
        measured, predicted = words.spread(amount.measured, case.world), words.spread(amount.predicted, case.world)
        for rank, one, other in zip(ranks, measured, predicted, strict=False):
            rank.measured[part], rank.predicted[part] = one, other
    for rank, peak in zip(ranks, words.spread(case.peak, case.world), strict=False):
        rank.measured["activations"] = max(peak - sum(rank.measured.values()), 0)
    return ranks
