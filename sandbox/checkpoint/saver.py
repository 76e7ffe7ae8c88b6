"""Saving, perhaps while the training goes on.

    training   step ... copy the state | step, step, step ...            | copy ...
    thread                              | plan, write, checksum, publish |

The copy is all that the training waits for (and an earlier save, if it is still under way). The thread has a process
group of its own: messages of a save and of a step must not meet.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, cast

import torch.distributed as dist

from sandbox.checkpoint import folder as folders
from sandbox.checkpoint.resume import about
from sandbox.checkpoint.state import held
from sandbox.checkpoint.storage import Piece, write
from sandbox.checkpoint.together import Together
from sandbox.errors import CheckpointError
from sandbox.trainer import Trainer

__all__ = ["Saver", "save"]


class Saver:
    """Writes checkpoints to `folder`/step-NNNNNN and keeps the newest `keep`. All ranks make one, and call it alike.

    Use it as a context, or call `wait` at the end: a save under way is not yet one. With `warn`, a save that could not
    be written is told to it at the next, which is then tried; only the last one is an error.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        asynchronous: bool = False,
        warn: Callable[[CheckpointError], None] | None = None,
    ) -> None:
        self.folder, self.keep, self.asynchronous, self._warn = folder, keep, asynchronous, warn
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._together: Together | None = None
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.wait()  # or else the other ranks may be gone, and the save with them

    def save(self, trainer: Trainer) -> None:
        """Save the trainer's state; if `asynchronous`, return as soon as it is copied.

        Raises CheckpointError, on all ranks, if nobody is warned: this save, or the one before, could not be written.
        Raises WorkerError, on all ranks: the disk is stuck.
        """
        try:
            self.wait()
        except CheckpointError as error:
            if self._warn is None:
                raise
            self._warn(error)
        self._together = self._together or Together.of(trainer, own=self.asynchronous)
        pieces = held(trainer, copy=self.asynchronous)
        facts = about(trainer)
        if self._thread:
            self._pending = self._thread.submit(self._write, self._together, trainer.step, pieces, facts)
            return
        self._pending = Future()
        try:
            self._write(self._together, trainer.step, pieces, facts)
            self._pending.set_result(None)
        except CheckpointError as error:
            self._pending.set_exception(error)
        if self._warn is None:
            self.wait()

    def wait(self) -> None:
        """Block until the save under way is complete, on all ranks."""
        pending, self._pending = self._pending, None
        if pending and self._together:
            with self._together.waiting():
                pending.result()

    def _write(self, together: Together, step: int, pieces: Mapping[str, Piece], facts: Mapping[str, Any]) -> None:
        first = not dist.is_initialized() or dist.get_rank() == 0
        try:
            (partial, *_) = together(lambda: folders.begin(self.folder, step) if first else None)
            partial = cast(Path, partial)
            sums = write(partial, pieces, together)

            def publish() -> None:
                folders.publish(partial, facts, sums)
                folders.prune(self.folder, self.keep)

            together(lambda: publish() if first else None)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: step {step} could not be saved: {error}") from None


def save(trainer: Trainer, folder: Path, keep: int = 2) -> Path:
    """Write the trainer's state now -> the checkpoint. All ranks call it."""
    with Saver(folder, keep=keep) as saver:
        saver.save(trainer)
    return folders.latest(folder)
