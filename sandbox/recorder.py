"""What a rank notes of its collectives: how much it sent, when, and where it stands, for who explains a hang."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Board", "Event", "Recorder"]


class Board(Protocol):
    """Where a rank writes which collective it is in, for whoever has to explain a hang or a difference."""

    def start(self, members: int, op: str, axis: str, shape: str) -> None:
        """The rank starts a collective of a group, a bit for each rank; all must agree on `shape`, with its dtype."""

    def enter(self, number: int, op: str, axis: str, shape: str) -> None:
        """The rank waits in a collective, of a tensor of that shape here, from now on."""

    def leave(self) -> None:
        """The rank has what it waited for."""

    def alive(self) -> None:
        """The rank gets on with something else: it reads or writes a checkpoint."""


@dataclass
class Event:
    """One collective: bytes sent by this rank, seconds on this rank's clock."""

    number: int
    op: str
    axis: str
    bytes: float
    start: float
    end: float = 0.0
    shape: str = ""


@dataclass
class Recorder:
    """Counts what this rank sends, by collective and axis. `detailed` keeps every event, with the time it ended."""

    board: Board | None = None
    detailed: bool = False
    sent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    events: list[Event] = field(default_factory=list)
    number: int = 0

    def launch(self, op: str, axis: str, sent: float, tensor: Tensor | None = None) -> Event:
        """A collective of `tensor` starts."""
        self.number += 1
        self.sent[f"{op} {axis}"] += sent
        shape = "" if tensor is None or self.board is None else _shape(tensor)
        event = Event(self.number, op, axis, sent, time.perf_counter(), shape=shape)
        if self.detailed:
            self.events.append(event)
        return event

    @contextmanager
    def waiting(self, op: str, axis: str) -> Iterator[None]:
        """The rank waits for others, and not in a collective that is counted."""
        self.number += 1
        if self.board:
            self.board.enter(self.number, op, axis, "")
        try:
            yield
        finally:
            if self.board:
                self.board.leave()


def _shape(tensor: Tensor) -> str:
    """`float32[2, 3]`."""
    return f"{_name(tensor.dtype)}{[*tensor.shape]}"


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
