"""Ranks that watch one another, where no launcher sees their boards: under torchrun, on one machine or several.

Once a second each rank puts its board into the store by which the ranks met: 6 KB, for 0.3 ms. The first rank reads
them all, to see whether everybody starts the same collectives, and the others only once they have nearly stood still
for too long, lest the first be lost. Who finds a fault first tells it, for all; the others say who did; and all end.

A rank that is stopped, or cut off, is one of which no new board comes. Machines have each their own clock, so what
happened on another is placed by when its board came here.

Nothing is waited for without end. The store may go with its machine: then each rank judges by its own board alone.
"""

import json
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from traceback import walk_stack
from types import FrameType
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from sandbox.errors import WorkerError
from sandbox.runtime.aside import begun
from sandbox.runtime.board import Board, Entry, outside_torch
from sandbox.runtime.desync import desync, hang, uneven
from sandbox.runtime.failure import Failure
from sandbox.runtime.member import Member, leave

__all__ = ["Watch"]

T = TypeVar("T")

_LOOK = 1.0
"""s between looks."""
_SILENT = 3.5
"""s without a new board after which a rank is taken for stopped or cut off."""
_IDLE = 10
"""Times as long may no rank get on when none waits in a collective."""
_AFTER = 1.5
"""s that the others end after the one who told: torchrun's summary shows the first, and knows no fractions."""
_SHARE = 0.01
"""Of the processor's time, what reading all boards may take: among many ranks it is done less often."""


class Watch:
    """Watches the world of this rank until `conclude`, in a thread, which ends this process where a fault is found.

    `store` is torch's, and may be in use by others. `round_` tells this world from earlier ones that had the same
    store. For `timeout` s somebody must get on, as in `launch`.
    """

    def __init__(self, member: Member, store: Any, round_: str, timeout: float) -> None:
        self._member, self._timeout = member, timeout
        self._store: Any = PrefixStore(f"watch/{round_}", store.clone())
        self._main = threading.get_ident()
        self._returned = False
        self._count, self._yielded = 0, 0
        self._suspect = False
        self._reading = 0.0  # when to read next
        self._heard: dict[int, _Heard] = {}
        self._asked: Future[Any] | None = None  # what was asked of the store last
        self._lock = threading.RLock()  # the thread's looks, and the last ones of the work's thread
        self._closed = threading.Event()
        self._exchange(read=False)  # before the work, lest a rank that is lost at once be one nobody has heard of
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def conclude(self) -> None:
        """The work of this rank is over: wait for the others'. To be called by all.

        Raises WorkerError, on the first rank: they have not started the same collectives.
        """
        self._returned = True
        lines: list[Any] = [None] * self._member.world
        dist.all_gather_object(lines, zlib.compress(self._member.board.line(), 1))
        with self._lock:
            self._closed.set()
        boards = [Board.copy(zlib.decompress(line)) for line in lines]
        if self._member.rank == 0 and (found := desync(boards) or uneven(boards)):
            raise WorkerError(found)

    def last_word(self, failure: Failure) -> str:
        """What else to say of this rank's failure: how its collectives differ from the others'. They end, too.

        If it is an echo, and another tells the cause, this ends the process with that.
        """
        with self._lock:
            self._exchange(read=False)
        if failure.echo:
            return ""
        if self._member.board.read().waiting:
            time.sleep(_LOOK)  # until all boards are as new as the fault
        with self._lock:
            self._exchange(read=True)
            self._closed.set()
            self._announce()
        return desync(self._boards())

    def _run(self) -> None:
        while not self._closed.wait(_LOOK):
            with self._lock:
                if not self._closed.is_set():  # while this waited for the lock
                    self._look()

    def _look(self) -> None:
        now, first = time.monotonic(), self._member.rank == 0
        still = now - self._member.board.read().moved
        read = still > self._timeout - _SILENT - _LOOK or (first and now > self._reading)
        begun = time.thread_time()
        self._exchange(read)
        if not read or not (first or 0 in self._silent()):
            return  # the first rank sees what this one does, and is where people look first
        if found := desync(self._boards()):
            if self._suspect:  # at the second look: boards are up to a second old, and the last to come belongs in, too
                self._tell(found)
            self._suspect, now = True, 0.0
        elif still > self._timeout and self._stuck():
            self._tell(self._report())
        self._reading = now + (time.thread_time() - begun) / _SHARE

    # What the others do

    def _exchange(self, read: bool) -> None:
        """Put this rank's board into the store; if `read`, take out the others'. End if another has told of a fault."""
        self._count += 1
        place = _place(sys._current_frames().get(self._main))
        word = _Word(self._count, time.monotonic(), self._returned, place, self._member.board.line())
        self._heard[self._member.rank] = _Heard(word, word.moment)
        others = [rank for rank in range(self._member.world) if rank != self._member.rank] if read else []

        def talk(store: Any) -> tuple[dict[int, bytes], bytes]:
            store.set(str(self._member.rank), word.pack())
            there = [rank for rank in others if rank in self._heard or store.check([str(rank)])]
            words = store.multi_get([str(rank) for rank in there]) if there else []
            return dict(zip(there, words, strict=True)), store.get("told") if store.check(["told"]) else b""

        words, teller = self._ask(talk) or ({}, b"")
        if teller:
            _say(text := f"rank {self._member.rank} ends: rank {teller.decode()} tells why.")
            self._ask(lambda store: store.add("known", 1))
            time.sleep(_AFTER)
            _record(text)
            leave(1)
        for rank, packed in words.items():
            new, old = _Word.unpack(packed), self._heard.get(rank)
            if old is None or old.word.count != new.count:
                self._heard[rank] = _Heard(new, time.monotonic())

    def _ask(self, call: Callable[[Any], T]) -> T | None:
        """What the store answers; None if it is gone, or slow: then no more is asked of it until it has answered."""
        if self._mute:
            return None
        self._asked = begun(lambda: call(self._store), "store")
        with suppress(TimeoutError, RuntimeError):  # torch's errors are RuntimeErrors
            return cast(T, self._asked.result(_SILENT))
        return None

    @property
    def _mute(self) -> bool:
        """Whether the store has not answered, or by an error: its connection is lost."""
        return self._asked is not None and (not self._asked.done() or self._asked.exception() is not None)

    def _boards(self) -> list[Board]:
        heard = self._heard
        return [heard[r].board if r in heard else Board.private() for r in range(self._member.world)]

    def _silent(self) -> set[int]:
        now = time.monotonic()
        return {r for r in range(self._member.world) if r not in self._heard or now - self._heard[r].at > _SILENT}

    # What to make of it

    def _stuck(self) -> bool:
        """Whether nobody got on, while one waits for another. If none waits, they may import or compile: for longer."""
        silent, patience = self._silent(), self._timeout
        entries = [heard.entry for rank, heard in self._heard.items() if rank not in silent]
        if not any(entry.waiting for entry in entries):
            patience *= _IDLE
        return all(time.monotonic() - entry.moved > patience for entry in entries)

    def _report(self) -> str:
        heard: Mapping[int, _Heard] = self._heard
        entries = [heard[rank].entry if rank in heard else Board.private().read() for rank in range(self._member.world)]
        if self._mute:
            seen = [f"  rank {rank}: {entry.last}" for rank, entry in enumerate(entries) if rank != self._member.rank]
            mine = f"rank {self._member.rank} makes no progress: {entries[self._member.rank]}"
            return "\n".join([f"{mine}. The store by which the ranks met does not answer. Of the others:", *seen])
        return hang(
            self._boards(),
            entries,
            returned={rank for rank in heard if heard[rank].word.returned},
            silent=self._silent(),
            places={rank: heard[rank].word.place for rank in heard},
            timeout=self._timeout,
        )

    def _tell(self, text: str) -> None:
        """Be the one to tell, and end; but let another who was first, unless that one is gone since."""
        mine = str(self._member.rank)
        first = self._ask(lambda store: store.compare_set("teller", "", mine))
        self._yielded += 1
        if first and first.decode() != mine and self._yielded < _SILENT / _LOOK:
            return
        _say(text)
        _record(text)
        self._announce()
        leave(1)

    def _announce(self) -> None:
        """Have the others know who tells, and wait until those who can do."""
        mine, living = str(self._member.rank), self._member.world - len(self._silent())
        self._ask(lambda store: store.set("told", mine))
        for _ in range(60):
            known = self._ask(lambda store: store.add("known", 0))
            if known is None or known >= living - 1:
                break
            time.sleep(_LOOK / 20)


@dataclass(frozen=True)
class _Word:
    """What a rank says of itself: the `count`-th time, at `moment` of its own clock."""

    count: int
    moment: float
    returned: bool
    place: str
    line: bytes

    def pack(self) -> bytes:
        head = self.count, self.moment, self.returned, self.place
        return json.dumps(head).encode() + b"\n" + zlib.compress(self.line, 1)

    @classmethod
    def unpack(cls, packed: bytes) -> "_Word":
        head, _, line = packed.partition(b"\n")
        count, moment, returned, place = json.loads(head)
        return cls(count, moment, returned, place, zlib.decompress(line))


@dataclass(frozen=True)
class _Heard:
    """A word, and when it came, by this rank's clock."""

    word: _Word
    at: float

    @property
    def board(self) -> Board:
        return Board.copy(self.word.line)

    @property
    def entry(self) -> Entry:
        """By this rank's clock."""
        entry, shift = self.board.read(), self.at - self.word.moment
        entered, left, alive = (moment and moment + shift for moment in (entry.entered, entry.left, entry.alive))
        return replace(entry, entered=entered, left=left, alive=alive)


def _place(frame: FrameType | None) -> str:
    """The innermost line that is not torch's."""
    for inner, line in walk_stack(frame):
        if outside_torch(inner.f_code.co_filename):
            return f"{inner.f_code.co_filename}:{line} in {inner.f_code.co_name}"
    return "?"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _record(text: str) -> None:
    """Note it for torchrun's summary."""
    try:
        raise WorkerError(text)
    except WorkerError as error:
        get_error_handler().record_exception(error)
