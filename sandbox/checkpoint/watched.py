"""Files that tell how much of them has been read or written, so that a slow disk is not taken for one that is stuck."""

import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

__all__ = ["Moved", "Watched", "unheard"]

Moved = Callable[[int], None]
"""Is told how many bytes were moved."""

_CHUNK = 2**22
_SYNC = 2**25


def unheard(count: int) -> None:
    """Nobody listens."""


class Watched(FileIO):
    """A file whose bytes are counted as they are moved, a few at a time; written ones as they come to the disk.

    Left to itself the kernel would take all of them at once, and be silent until it is done with them.
    """

    def __init__(self, path: Path, mode: str, moved: Moved) -> None:
        super().__init__(path, mode)
        self._moved, self._dirty = moved, 0

    def write(self, data: Any) -> int:
        """Some of `data`, at least a byte."""
        done = super().write(memoryview(data)[:_CHUNK])
        self._dirty += done
        if self._dirty >= _SYNC:
            os.fsync(self.fileno())
            self._dirty = 0
        self._moved(done)
        return done

    def readinto(self, buffer: Any) -> int:
        """Some bytes, none at the end of the file."""
        done = super().readinto(memoryview(buffer)[:_CHUNK])
        self._moved(done)
        return done
