"""Verdicts as a table in Markdown: which engine computes a strategy, how exactly, with which bytes and memory."""

from collections.abc import Iterable, Sequence

from sandbox.report import words
from sandbox.report.cases import groups
from sandbox.verdict import Verdict, Verdicts

__all__ = ["table"]

HEAD = (
    "strategy", "engine", "held", "ranks", "dtype", "worst error", "allowed", "bytes / theory",
    "sent", "kept", "peak",
)  # fmt: skip
LEAD = """# Who computes what, how exactly, with which bytes and memory

Written by `sandbox report FILE... --table`. *Worst error*: of any gradient or parameter, over all cases that held, and
what was *allowed*. *Bytes / theory*: 1 where all of them sent what the strategy's formula says, to the byte. *Sent*: by
a rank in a step; *kept*: its parameters, gradients and optimizer state after it; *peak*: the most within; all three of
one case, on as near to four ranks as there is. Compositions of as many axes are one strategy.
"""

USUAL = 4
"""Ranks of the case whose bytes are shown, where there is one: the same for all, so that they can be compared."""


def table(verdicts: Verdicts) -> str:
    """A page with a line for each strategy, engine and dtype. Bytes are those of the largest rank."""
    lines = [HEAD, tuple("---" for _ in HEAD)]
    for group in groups(verdicts.cases):
        for dtype in dict.fromkeys(case.dtype for case in group.cases):
            cases = [case for case in group.cases if case.dtype == dtype]
            lines.append((group.strategy, group.engine, *_line(dtype, cases)))
    versions = ", ".join(f"{name} {version}" for name, version in verdicts.versions.items())
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{LEAD}\n{words.summary(verdicts)}. {versions}.\n\n{rows}\n"


def _line(dtype: str, cases: Sequence[Verdict]) -> Iterable[str]:
    held = [case for case in cases if case.status == "held"]
    worlds = sorted({case.world for case in cases})
    yield f"{len(held)} of {len(cases)}"
    yield f"{worlds[0]}" if len(worlds) == 1 else f"{worlds[0]} to {worlds[-1]}"
    yield dtype
    if not held:
        yield from [words.NONE] * 6
        return
    yield words.error(max(words.worst([*case.gradients, *case.parameters]) for case in held))
    yield words.error(max(case.tolerance for case in held))
    yield words.factor(amount for case in held for amount in case.traffic.values())
    shown = min(held, key=lambda case: abs(case.world - USUAL))
    for amounts in (shown.traffic, shown.memory):
        by_rank = [words.spread(amount.measured, shown.world) for amount in amounts.values()]
        yield words.size(max(map(sum, zip(*by_rank, strict=True)), default=0))
    yield words.size(max(shown.peak)) if shown.peak else ""
