"""What a slow network did to the steps of strategies: benchmarks/slow_link.py measures it, the report shows it."""

from collections.abc import Iterator
from itertools import groupby

from pydantic import BaseModel, Field

from sandbox.verdict import PLAIN

__all__ = ["LinkStep", "SlowLink"]


class LinkStep(BaseModel):
    """A step of one strategy, between hosts that can send each other `rate` only, and between hosts without a limit."""

    model_config = PLAIN

    ranks: str  # hosts x ranks on each
    name: str
    sent: int  # bytes of the rank that sends most, by the strategy's formula
    crossed: float  # bytes that left the busier host, as its network card counted
    least: float = Field(gt=0)  # seconds: crossed / rate
    slow: float = Field(gt=0)  # seconds of the step over the slow link
    fast: float = Field(gt=0)  # and over the fast one
    other: str = ""  # the strategy of the same list that it should beat: without overlap, or without hierarchy

    @property
    def hidden(self) -> float:
        """Of the time that the link and the rest of the step could share, the part that they did: 1 is all of it."""
        return (self.least + self.fast - self.slow) / min(self.least, self.fast)


class SlowLink(BaseModel):
    """The steps, by how many ranks are on a host."""

    model_config = PLAIN

    rate: str  # as tc writes it: 100mbit
    steps: list[LinkStep]

    def groups(self) -> Iterator[tuple[str, list[LinkStep]]]:
        """Steps by `ranks`, in their order."""
        for ranks, steps in groupby(self.steps, lambda step: step.ranks):
            yield ranks, list(steps)

    @property
    def longest(self) -> float:
        """Seconds of the longest step, at least a little."""
        return max((max(step.slow, step.fast, step.least) for step in self.steps), default=1.0)

    def gain(self, step: LinkStep) -> float | None:
        """How many times as fast as the other one, if it names one that is here."""
        return next((o.slow / step.slow for o in self.steps if (o.name, o.ranks) == (step.other, step.ranks)), None)
