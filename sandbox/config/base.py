"""What the sections of a config are made of, and what their messages have in common."""

import reprlib
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Count", "Fraction", "Options", "Section", "brief", "divisors", "that_do"]

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxstring, _brief.maxother = 2, 80, 80


class Section(BaseModel):
    """A part of a config: frozen, unknown keys refused, and numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Options(Section):
    """Base of a strategy's own options; they stand beside `degree` and `strategy` in the axis' section."""


def brief(value: object) -> str:
    """A value as a message shows it: a file may hold lists of lists of lists."""
    return _brief.repr(value)


def divisors(total: int) -> str:
    """The settings that would work where a number has to divide `total`, as a sentence."""
    return that_do([n for n in range(1, min(total, 10_000) + 1) if total % n == 0], more=total > 10_000)


def that_do(settings: Sequence[int], what: str = "Those", *, more: bool = False) -> str:
    """The settings that would work, from the smallest, as a sentence. `more`: there are others beyond them."""
    start, stop = settings[0], settings[-1]
    if len(settings) > 2 and list(settings) == list(range(start, stop + 1)) and not more:
        return f"{what} that do: {start} to {stop}."
    return f"{what} that do: {', '.join(map(str, settings[:20]))}{', ...' if more or len(settings) > 20 else ''}."
