"""Work that every rank does, each its part: at its own pace, but not for ever.

A disk may be slow, and that is no fault; or stuck, and that is one. A collective cannot tell: it fails after a fixed
time, however much the others get done in it. So each rank works in a thread, and meanwhile all tell one another, ten
times in `timeout`, how many bytes they have moved. While any rank moves some, or comes to its end, all wait on.
"""

from collections.abc import Callable
from concurrent.futures import wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Self, TypeVar, cast

import torch.distributed as dist

from sandbox.errors import CheckpointError, WorkerError
from sandbox.recorder import Recorder
from sandbox.runtime.aside import begun
from sandbox.runtime.board import ranks
from sandbox.trainer import Trainer

__all__ = ["Together"]

T = TypeVar("T")

_LOOKS = 10  # in the time after which standing still is a fault
_STILL = 8  # looks, so that this is told before the launcher takes it for a hang that it knows nothing of


class Together:
    """`together(work)`: see there. All ranks make one, and call it alike.

    `timeout` in s, None for ever. Bytes that this rank has moved, `together.moved(bytes)` in the work, and its waiting
    for others stand on the board of `recorder`. `group` None: the world's; another is for a thread beside the training.

    Raises CheckpointError, on all ranks: it failed on one.
    Raises WorkerError, on all ranks: for `timeout` no rank moved a byte.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        timeout: float | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.group, self.timeout, self._recorder, self._bytes = group, timeout, recorder or Recorder(), 0

    @classmethod
    def of(cls, trainer: Trainer, *, own: bool = False) -> Self:
        """For the ranks of a trainer. `own`: in a group of their own, for a thread beside the training."""
        timeout, group = trainer.config.run.timeout, None
        if own and dist.is_initialized():  # twice that, for who reads the boards explains a hang better, and first
            limit = timedelta(seconds=2 * timeout)
            group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=limit))
        return cls(group, timeout, trainer.mesh.recorder)

    def moved(self, count: int) -> None:
        """Note that this rank has read or written so many bytes. Called by the work."""
        self._bytes += count
        if self._recorder.board:
            self._recorder.board.alive()

    def waiting(self) -> AbstractContextManager[None]:
        """Within it the thread of the training waits for the others."""
        return self._recorder.waiting("checkpoint", "world")

    def __call__(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on all ranks -> its results by rank."""
        mine = begun(lambda: _ended(work), "checkpoint files")
        before, still = None, 0
        while True:
            wait([mine], None if self.timeout is None else self.timeout / _LOOKS)
            everyone = self._exchange(_State(self._bytes, mine.result() if mine.done() else None))
            if all(state.done for state in everyone):
                break
            now = [(state.moved, state.done is None) for state in everyone]
            before, still = now, still + 1 if now == before else 0
            if still == _STILL:
                late = [rank for rank, state in enumerate(everyone) if not state.done]
                raise WorkerError(
                    f"{ranks(late).capitalize()} did not read or write a byte of a checkpoint for "
                    f"{still * (self.timeout or 0) / _LOOKS:.1f} s: the disk is stuck. "
                    "If it is just as slow, set run.timeout higher."
                )
        ended = [cast(_Done[T], state.done) for state in everyone]
        if failed := list(dict.fromkeys(done.error for done in ended if done.error)):
            raise CheckpointError("\n".join(failed))
        return [cast(T, done.result) for done in ended]

    def _exchange(self, mine: "_State[T]") -> "list[_State[T]]":
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return [mine]
        everyone: list[Any] = [None] * dist.get_world_size()
        with nullcontext() if self.group else self.waiting():
            dist.all_gather_object(everyone, mine, group=self.group)
        return everyone


@dataclass(frozen=True)
class _Done(Generic[T]):
    result: T | None
    error: str = ""


@dataclass(frozen=True)
class _State(Generic[T]):
    moved: int
    done: _Done[T] | None


def _ended(work: Callable[[], T]) -> "_Done[T]":
    """What becomes of `work`, to tell the others."""
    try:
        return _Done(work())
    except CheckpointError as error:
        return _Done(None, str(error))
    except Exception as error:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return _Done(None, f"on rank {rank}: {error!r}")
