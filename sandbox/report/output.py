"""Files for the user, written whole or not at all: a full disk costs no older file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.errors import SandboxError

__all__ = ["output"]


@contextmanager
def output(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `file` when the block ends without an error. Folders are made.

    Raises SandboxError: it cannot be written. What was there before stays.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink() or (file.exists() and not file.is_file()) or not os.access(file.parent, os.W_OK):
            yield file  # a link, a device or a pipe stays what it is; and some folders take no new file
            return
        partial = file.with_name(f".partial-{os.getpid()}{file.suffix}")
        try:
            yield partial
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise SandboxError(f"{file}: cannot be written ({error.strerror}). Make room, or name another place.") from None
