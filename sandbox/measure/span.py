"""Something that took a rank some time, as plain data."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["Span"]


class Span(BaseModel):
    """Something a rank was busy with, in seconds since its step began."""

    model_config = ConfigDict(extra="forbid")

    lane: Literal["compute", "collective"]
    name: str  # forward, backward, optimizer; or the collective and its axis
    start: float
    end: float
    bytes: int = 0
