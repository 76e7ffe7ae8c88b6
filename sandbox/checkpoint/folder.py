"""A checkpoint on disk: whole or not there, and still what was written.

It is written as `step-NNNNNN.partial`, sealed by its checksums, and renamed. A folder is never written into twice, and
one that is to be removed is renamed first. So whenever the writer dies, a folder named `step-NNNNNN` is whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from sandbox.checkpoint.watched import Moved, Watched, unheard
from sandbox.errors import CheckpointError

__all__ = [
    "ADVICE", "FACTS", "SUMS", "begin", "checksum", "complete", "facts", "find", "latest", "newest", "problems",
    "prune", "publish", "set_aside", "told",
]  # fmt: skip

ADVICE = "Remove the checkpoint, and go on from one before."
FACTS = "run.json"
SUMS = "SHA256SUMS"
"""Checksums of all other files, in the format of `sha256sum`. That it is there says that the save came to its end."""

_NAME = re.compile(r"step-(\d+)")
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)\n")


def latest(folder: Path) -> Path:
    """The newest complete checkpoint in `folder`. Raises CheckpointError if there is none."""
    found = newest(folder)
    if not found:
        raise CheckpointError(f"{folder}: holds no checkpoint. Train with run.checkpoint_every: N first.")
    return found


def newest(folder: Path) -> Path | None:
    """As `latest`, but None if there is none."""
    found = complete(folder)
    return found[-1] if found else None


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    steps = {path: match for path in _entries(folder) if (match := _NAME.fullmatch(path.name))}
    return sorted((path for path in steps if (path / SUMS).exists()), key=lambda path: int(steps[path][1]))


def find(path: Path) -> Path:
    """The checkpoint that a person means by `path`: itself, or the newest in a folder of checkpoints or of a run."""
    if (path / SUMS).exists():
        return path
    inside = path / "checkpoints"
    return latest(inside if inside.is_dir() else path)


def facts(checkpoint: Path) -> dict[str, Any]:
    """What run.json says: `step`, and `config` by section. Raises CheckpointError: it cannot be read."""
    try:
        found = json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))
        step, config = found["step"], found["config"]
        if type(step) is not int or step < 0:
            raise ValueError(f"step {step!r}")
        sections = {name: config.get(name, {}) for name in ("mesh", "model", "data", "train")}
        if not all(isinstance(section, dict) for section in sections.values()):
            raise TypeError("a section is no mapping")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint / FACTS}: is damaged ({told(error)}). {ADVICE}") from None
    return {"step": step, "config": {**config, **sections}}


def begin(folder: Path, step: int) -> Path:
    """Make a fresh folder to write the checkpoint of `step` into; clear away what a killed save has left."""
    final = folder / f"step-{step:06d}"
    if final.exists():
        raise CheckpointError(f"{final}: exists already, and a checkpoint is never overwritten. Remove it first.")
    for leftover in (*folder.glob("step-*.partial"), *folder.glob("step-*.old")):
        shutil.rmtree(leftover)
    partial = final.with_suffix(".partial")
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, about: Mapping[str, Any], sums: Mapping[str, str]) -> Path:
    """Seal a folder whose files have these checksums, and give it its name."""
    _write(partial / FACTS, json.dumps(about, indent=1))
    sums = {**sums, FACTS: checksum(partial / FACTS)}
    _write(partial / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    _sync(partial)
    final = partial.with_suffix("")
    partial.rename(final)
    _sync(final.parent)
    return final


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, at least one."""
    for old in complete(folder)[: -max(1, keep)]:
        shutil.rmtree(old.rename(old.with_suffix(".old")))  # renamed, for half a checkpoint must not look like one


def set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint another name, under which it is none, and is kept for whoever wants to look at it."""
    aside = checkpoint.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def checksum(file: Path, moved: Moved = unheard) -> str:
    """SHA-256 of a file, in hexadecimal. `moved` is told of the bytes as they are read."""
    with Watched(file, "r", moved) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def problems(checkpoint: Path, part: int = 0, parts: int = 1, moved: Moved = unheard) -> list[str]:
    """What is wrong with the files, a sentence each; of `parts` ranks, the one numbered `part` reads its share of them.

    Reading costs what SHA-256 does, two thirds of a second for a gigabyte, divided by the ranks.
    """
    try:
        text = (checkpoint / SUMS).read_text(encoding="utf-8")
        present = {entry.name for entry in checkpoint.iterdir()} - {SUMS}
    except (OSError, UnicodeDecodeError) as error:
        return [f"{checkpoint / SUMS}: cannot be read ({getattr(error, 'strerror', None) or error}). {ADVICE}"]
    sums = {name: digest for digest, name in _LINE.findall(text)}
    if len(text) != sum(len(digest) + len(name) + 3 for name, digest in sums.items()) or FACTS not in sums:
        return [f"{checkpoint / SUMS}: is damaged. {ADVICE}"]
    found = [f"{checkpoint / name}: is missing. {ADVICE}" for name in sorted(sums.keys() - present)]
    found += [f"{checkpoint / name}: is not in {SUMS}. {ADVICE}" for name in sorted(present - sums.keys())]
    for name in sorted(sums.keys() & present)[part::parts]:
        try:
            if checksum(checkpoint / name, moved) != sums[name]:
                found.append(f"{checkpoint / name}: is damaged: its checksum is not the one in {SUMS}. {ADVICE}")
        except OSError as error:
            found.append(f"{checkpoint / name}: cannot be read ({error.strerror}). {ADVICE}")
    return found


def told(error: Exception) -> str:
    """An error that a file brought about, in some words: its own may hold all of the file."""
    return shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


def _entries(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _write(file: Path, text: str) -> None:
    with file.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Bring names, too, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
