"""Where every rank stands: its last collective, written where others can read it when the rank cannot answer.

A rank that hangs inside a collective answers no question. So it notes each collective as it enters and leaves it,
in a file that its launcher maps as well. A note costs about 1 us, of which nothing is a system call.

It also notes which collectives it starts, by group of ranks: those must start the same in the same order (`desync`).
"""

import mmap
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Self
from zlib import crc32

__all__ = ["KEPT", "Board", "Entry", "Start", "outside_torch", "ranks", "size_of", "stalled"]

_RECORD = struct.Struct("=ddq32s32s40s")  # entered, left, number, op, axis, shape
_MOMENT = struct.Struct("=d")
_START = struct.Struct("=qI32s32s32s40s")  # count, chain, members, op, axis, shape

KEPT = 512
"""Collectives of each rank that the board remembers."""


@dataclass(frozen=True)
class Entry:
    """One rank's last collective. `shape` is as in `Board.start`; `entered` and `left` are `time.monotonic()`, or 0.

    `alive` is when the rank last got on with something else: reading or writing a checkpoint.
    """

    entered: float
    left: float
    number: int
    op: str
    axis: str
    shape: str = ""
    alive: float = 0.0

    @property
    def waiting(self) -> bool:
        """The rank is inside the collective."""
        return self.entered > 0 and self.left == 0

    @property
    def moved(self) -> float:
        """When the rank entered, left or got on with something else, whichever was last."""
        return max(self.entered, self.left, self.alive)

    @property
    def name(self) -> str:
        """The collective, without its state: `#12 all_reduce of float32[1024] over dp_shard`."""
        return f"#{self.number} {_of(self.op, self.shape)} over {self.axis}"

    @property
    def last(self) -> str:
        """What the rank was last seen at, where nobody knows how long ago."""
        if not self.entered:
            return "nothing was heard of it"
        return f"it was last seen {'in' if self.waiting else 'after'} {self.name}"

    def __str__(self) -> str:
        if not self.entered:
            return "no collective so far"
        now = time.monotonic()
        ago = f"{now - max(self.entered, self.left):.1f} s"
        text = f"waiting for {ago} in {self.name}" if self.waiting else f"finished {self.name}, {ago} ago"
        return text if self.alive < self.moved else f"{text}; moved a checkpoint's bytes {now - self.alive:.1f} s ago"


@dataclass(frozen=True)
class Start:
    """A collective that a rank has started: the `count`-th one of the group `members`, a bit for each rank.

    `shape` is what all of them must agree on, or empty. `chain` stands for this one and all before it.
    """

    count: int
    chain: int
    members: int
    op: str
    axis: str
    shape: str

    @property
    def name(self) -> str:
        """Op and shape: `all_reduce of float32[1024]`."""
        return _of(self.op, self.shape)


class Board:
    """One rank's line on the board. `memory` holds the lines of all ranks."""

    def __init__(self, memory: mmap.mmap | bytearray, rank: int) -> None:
        self._memory = memory
        self._offset = rank * size_of(1)
        self._alive = self._offset + _RECORD.size
        self._starts = self._alive + _MOMENT.size
        self._started = 0
        self._chains: dict[int, tuple[int, int]] = {}

    @classmethod
    def private(cls) -> Self:
        """A board that no other process reads."""
        return cls(mmap.mmap(-1, size_of(1)), 0)

    @classmethod
    def copy(cls, line: bytes) -> Self:
        """A board as it was when it gave its `line`."""
        return cls(bytearray(line), 0)

    def line(self) -> bytes:
        """All that stands on it."""
        return bytes(self._memory[self._offset : self._offset + size_of(1)])

    def enter(self, number: int, op: str, axis: str, shape: str = "") -> None:
        """Note that the rank enters its `number`-th collective. Names are cut after 32 bytes, shapes after 40."""
        names = op.encode(), axis.encode(), shape.encode()
        _RECORD.pack_into(self._memory, self._offset, time.monotonic(), 0.0, number, *names)

    def leave(self) -> None:
        """Note that the rank has left the collective that it entered last."""
        _MOMENT.pack_into(self._memory, self._offset + _MOMENT.size, time.monotonic())

    def alive(self) -> None:
        """Note that the rank gets on with something that is no collective. May be called by another thread."""
        _MOMENT.pack_into(self._memory, self._alive, time.monotonic())

    def start(self, members: int, op: str, axis: str, shape: str = "") -> None:
        """Note that the rank starts a collective of the group `members`, as in `Start`."""
        count, chain = self._chains.get(members, (0, 0))
        count, chain = count + 1, crc32(f"{op} {axis} {shape}".encode(), chain)
        self._chains[members] = count, chain
        place = self._starts + self._started % KEPT * _START.size
        bits = members.to_bytes(32, "little")
        _START.pack_into(self._memory, place, count, chain, bits, op.encode(), axis.encode(), shape.encode())
        self._started += 1

    def starts(self) -> list[Start]:
        """The collectives that the rank has started last, in no order."""
        end = self._starts + KEPT * _START.size
        found = []
        for count, chain, members, *names in _START.iter_unpack(self._memory[self._starts : end]):
            if count:
                found.append(Start(count, chain, int.from_bytes(members, "little"), *map(_text, names)))
        return found

    def read(self) -> Entry:
        """The rank's last collective."""
        entered, left, number, *names = _RECORD.unpack_from(self._memory, self._offset)
        (alive,) = _MOMENT.unpack_from(self._memory, self._alive)
        op, axis, shape = map(_text, names)
        return Entry(entered, left, number, op, axis, shape, alive)


def _of(op: str, shape: str) -> str:
    return f"{op} of {shape}" if shape else op


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode(errors="replace")


def size_of(world: int) -> int:
    """Bytes of the memory of a board for `world` ranks."""
    return world * (_RECORD.size + _MOMENT.size + KEPT * _START.size)


def stalled(
    entries: Sequence[Entry], *, returned: Set[int], silent: Set[int], places: Mapping[int, str], timeout: float
) -> str:
    """Report a hang: where each rank stands, and which one the others wait for.

    `returned` holds the ranks whose work is over, `silent` those that do not answer; `places` maps ranks to the line of
    Python they are at, where known.
    """
    lines = [f"no rank made progress for {timeout:g} s. {_verdict(entries, returned, silent)}"]
    for rank, entry in enumerate(entries):
        if rank in silent:
            place = f"does not answer: stopped, dead or cut off. {entry.last.capitalize()}"
        else:
            place = f"returned; {entry}" if rank in returned else f"{entry}; at {places.get(rank, '?')}"
        lines.append(f"  rank {rank}: {place}")
    return "\n".join(lines)


def _verdict(entries: Sequence[Entry], returned: Set[int], silent: Set[int]) -> str:
    waiting = {rank: entry.name for rank, entry in enumerate(entries) if entry.waiting and rank not in silent}
    absent = [rank for rank in range(len(entries)) if rank not in waiting]
    if not waiting:
        return "None waits in a collective: the work itself is stuck, or slower than the timeout."
    names = Counter(waiting.values()).most_common()
    if absent:
        gone = " (returned already)" if returned >= set(absent) else " (silent)" if silent >= set(absent) else ""
        what = names[0][0] if len(names) == 1 else "their collectives"
        return f"{ranks(absent).capitalize()}{gone} never arrived: the others wait in {what}."
    if len(names) == 1:
        return "All wait in the same collective: the network is stuck, or slower than the timeout."
    if names[0][1] == names[1][1]:
        return "They wait in different collectives."
    odd = [rank for rank, name in waiting.items() if name != names[0][0]]
    verb = "waits" if len(odd) == 1 else "wait"
    return f"{ranks(odd).capitalize()} {verb} in another collective than the others, which are in {names[0][0]}."


def outside_torch(file: str) -> bool:
    """Whether a line of that file tells where in the work a rank is."""
    return "site-packages/torch/" not in file


def ranks(numbers: Sequence[int]) -> str:
    """Name some ranks: `rank 2`, `ranks 0, 1 and 3`."""
    *most, last = map(str, numbers)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"
