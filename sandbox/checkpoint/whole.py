"""A checkpoint as whole tensors, without the world that wrote it; as one file; and made of whole tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sandbox.checkpoint.folder import begin, facts, problems, publish
from sandbox.checkpoint.storage import Piece, index, read, write
from sandbox.checkpoint.together import Together
from sandbox.errors import CheckpointError
from sandbox.layout import Layout

__all__ = ["load", "make", "save_file"]


def load(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors whose names begin with `prefix`, in one process. Raises CheckpointError: damaged."""
    if wrong := problems(checkpoint):
        raise CheckpointError("\n".join(wrong))
    stored = {name: entry for name, entry in index(checkpoint).items() if name.startswith(prefix)}
    room = sum(file.stat().st_size for file in checkpoint.iterdir())
    if sum(entry.nbytes for entry in stored.values()) > room:
        raise CheckpointError(f"{checkpoint}: is damaged (its index tells of more than its files hold).")
    pieces = {name: Piece.empty(Layout.whole(entry.shape), entry.dtype) for name, entry in stored.items()}
    read(checkpoint, pieces)
    return {name: piece.local for name, piece in sorted(pieces.items())}


def make(folder: Path, step: int, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write whole tensors by name, such as `parameters/embed.weight`, as the checkpoint of `step` in `folder`."""
    partial = begin(folder, step)
    sums = write(partial, {name: Piece(Layout.whole(tuple(t.shape)), t) for name, t in tensors.items()}, Together())
    return publish(partial, {"step": step, "config": config}, sums)


def save_file(checkpoint: Path, file: Path) -> int:
    """Write all tensors, optimizer state too, to one safetensors file under their own names -> how many."""
    from safetensors.torch import save_file

    tensors = load(checkpoint)
    about = {"step": str(facts(checkpoint)["step"]), "checkpoint": checkpoint.name}
    unfinished = file.with_name(f"{file.name}.partial")
    save_file(tensors, unfinished, metadata=about)
    unfinished.rename(file)
    return len(tensors)
