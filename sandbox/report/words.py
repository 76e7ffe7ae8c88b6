"""How figures and findings are worded, alike in the terminal and on the page."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from sandbox.verdict import Amount, Difference, Verdict, Verdicts

__all__ = [
    "MARKS",
    "NONE",
    "differing",
    "duration",
    "error",
    "exceeds",
    "factor",
    "headline",
    "size",
    "spread",
    "summary",
    "worst",
]

NONE = "\u2013"
WITHIN = "≤ 1"
"""A dash, where there is nothing to say."""

MARKS = {"held": "✓", "mismatch": "✗", "failed": "✗", "unsupported": NONE}
"""Status -> the mark in front of a case."""


def error(value: float) -> str:
    """A relative error: `5.6e-17`, or `0` where nothing differs."""
    return "0" if value == 0 else f"{value:.1e}"


def size(count: float) -> str:
    """A number of bytes: `1.25 MiB`."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log2(count) // 10), 4)
    value = count / 1024**power
    return f"{value:.0f} {' KMGT'[power]}iB" if value >= 100 else f"{value:.3g} {' KMGT'[power]}iB"


def duration(seconds: float) -> str:
    """A time: `3.1 ms`, `0.2 s`, `48 s`, `2 min 5 s`."""
    if seconds < 0.1:
        return f"{seconds * 1e3:.2g} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def factor(amounts: Iterable[Amount]) -> str:
    """Measured over predicted bytes: `1` where every figure is as predicted, `1.03`, a dash with nothing to compare.

    Where the data decide, `≤ 1`: all is within what was predicted.
    """
    amounts = list(amounts)
    if not amounts:
        return NONE
    if all(_same(amount) for amount in amounts):
        return "1" if all(amount.least in ([], amount.predicted) for amount in amounts) else WITHIN
    # Per-amount means, since either side may say one figure for all ranks.
    measured, predicted = (
        sum(sum(side) / len(side) for a in amounts if (side := getattr(a, name))) for name in ("measured", "predicted")
    )
    return f"{measured / predicted:.3f}" if predicted else "∞"


def spread(values: Sequence[int], world: int) -> list[int]:
    """One value a rank; a single one holds for all."""
    return list(values) * world if len(values) == 1 else list(values)


def exceeds(value: float, tolerance: float) -> bool:
    """Whether an error is beyond the tolerance; NaN is."""
    return not value <= tolerance


def worst(differences: Iterable[Difference]) -> float:
    """The largest error; NaN is larger than any."""
    return max((d.error for d in differences), key=lambda e: math.inf if math.isnan(e) else e, default=0.0)


def differing(verdict: Verdict) -> list[Difference]:
    """The tensors that a mismatch is about: gradients, else parameters, beyond the tolerance."""
    for tensors in (verdict.gradients, verdict.parameters):
        if beyond := [d for d in tensors if exceeds(d.error, verdict.tolerance)]:
            return beyond
    return []


def headline(verdict: Verdict) -> str:
    """What went wrong, in a line: `5 of 38 gradients differ from the unsharded run`."""
    if verdict.status in ("failed", "unsupported"):
        return {"failed": "did not finish", "unsupported": "cannot run here"}[verdict.status]
    count = len(differing(verdict))
    tensors = [*verdict.gradients, *verdict.parameters]
    after = f" after {len(verdict.losses)} steps" if verdict.losses else ""
    findings = {
        f"{count} of {len(verdict.gradients)} gradients differ from the unsharded run": worst(verdict.gradients),
        f"gradients agree, but {count} of {len(verdict.parameters)} parameters differ{after}": worst(
            verdict.parameters
        ),
        "the global gradient norm differs from the unsharded run": verdict.norm,
        "the loss differs from the unsharded run": verdict.loss,
        "ranks differ in what they hold of the same tensor": max((d.drift for d in tensors), default=0.0),
    }
    found = (text for text, value in findings.items() if exceeds(value, verdict.tolerance))
    return next(found, "differs from the unsharded run")


def summary(verdicts: Verdicts) -> str:
    """One line about all: `61 cases: 59 held, 2 mismatches, in 48 s`."""
    counts = Counter(case.status for case in verdicts.cases)
    parts = [f"{counts['held']} held"]
    if counts["mismatch"]:
        parts.append(_plural(counts["mismatch"], "mismatch", "mismatches"))
    parts += [f"{counts[status]} {status}" for status in ("failed", "unsupported") if counts[status]]
    return f"{_plural(len(verdicts.cases), 'case', 'cases')}: {', '.join(parts)}, in {duration(verdicts.seconds)}"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _same(amount: Amount) -> bool:
    ranks = max(len(amount.predicted), len(amount.measured))
    sides = (spread(side, ranks) for side in (amount.least or amount.predicted, amount.measured, amount.predicted))
    return all(low <= value <= high for low, value, high in zip(*sides, strict=True))
