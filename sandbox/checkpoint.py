"""All that a training needs to go on, saved through torch's distributed checkpoint (DCP).

Each rank saves its own pieces under its own keys, so the same layout resumes to the bit. A checkpoint is a folder that
did not exist before: written under another name, then renamed when every rank is done. One killed midway is never
taken for a good one (DCP alone would load a half-overwritten folder, old and new mixed, without an error).

    step-000100/  run.json   step, and the layout that saved it
                  *.distcp   tensors   parameters and optimizer state of each rank

The data's position is the step, and dropout has no generator: nothing else is random.
"""

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sandbox.config import Config
from sandbox.errors import CheckpointError
from sandbox.layout import local
from sandbox.trainer import Trainer

__all__ = ["latest", "restore", "save"]

FACTS = "run.json"


def save(trainer: Trainer, folder: Path, keep: int = 2) -> Path:
    """Write the trainer's state to `folder`/step-NNNNNN; keep the newest `keep` checkpoints. All ranks call it."""
    final = folder / f"step-{trainer.step:06d}"
    partial = final.with_suffix(".partial")
    first = trainer.mesh.rank == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    with warnings.catch_warnings():  # that a world of one saves alone
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_saver.save(_state(trainer), checkpoint_id=partial, no_dist=trainer.mesh.world == 1)
    if first:
        facts = {"step": trainer.step, "layout": _layout(trainer.config)}
        (partial / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        others = [old for old in _all(folder) if old != final]
        for old in others[: max(0, len(others) - keep + 1)]:
            shutil.rmtree(old)
    _barrier()
    return final


def latest(folder: Path) -> Path:
    """The newest complete checkpoint in `folder`. Raises CheckpointError if there is none."""
    found = _all(folder)
    if not found:
        raise CheckpointError(f"{folder}: holds no checkpoint. Train with run.checkpoint_every: N first.")
    return found[-1]


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Bring the trainer to the state that `checkpoint` holds. All ranks call it.

    Raises CheckpointError: unreadable, or saved by another layout, model or optimizer.
    """
    try:
        facts = json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))
        step, saved_by = facts["step"], facts["layout"]
        metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{checkpoint}: is damaged ({error!r}). Remove it, and resume from one before.") from None
    for key, value in _layout(trainer.config).items():
        if saved_by.get(key) != value:
            raise CheckpointError(
                f"{checkpoint}: was saved with {key} {saved_by.get(key)}, this run has {value}. "
                f"Resume with the same {key}."
            )
    mine = f"rank{trainer.mesh.rank}/"
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if key.startswith(mine) and isinstance(entry, TensorStorageMetadata)
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            state_dict_loader.load(state, checkpoint_id=checkpoint, no_dist=trainer.mesh.world == 1)
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause[0]!r}" for rank, cause in error.failures.items())
        raise CheckpointError(f"{checkpoint}: is damaged ({causes}). Remove it, and resume from one before.") from None
    optimizer = trainer.optimizer
    with torch.no_grad():
        for key, tensor in state.items():
            kind, name, *field = key.removeprefix(mine).split("/")
            param = trainer.program.parameters[name]
            if kind == "parameters":
                local(param).copy_(tensor)
            else:
                optimizer.state[param][field[0]] = _like(param, tensor)
    trainer.step = step
    trainer.program.refresh()


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """Tensors of this rank by key: `rank0/parameters/NAME`, `rank0/optimizer/NAME/FIELD`."""
    mine, optimizer = f"rank{trainer.mesh.rank}", trainer.optimizer
    state = {}
    for name, param in trainer.program.parameters.items():
        if param.numel():
            state[f"{mine}/parameters/{name}"] = local(param.detach()).clone()
            for field, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    state[f"{mine}/optimizer/{name}/{field}"] = local(value.detach())
    return state


def _like(param: Tensor, value: Tensor) -> Tensor:
    """`value` as the optimizer keeps it: a DTensor if the parameter is one and the shapes agree."""
    if value.shape != local(param).shape or local(param) is param:
        return value.to(param.device) if value.dim() else value
    from torch.distributed.tensor import DTensor

    assert isinstance(param, DTensor)
    return DTensor.from_local(
        value.to(param.device), param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
    )


def _layout(config: Config) -> dict[str, Any]:
    """What must be the same for a checkpoint to fit."""
    return {
        "engine": config.engine,
        "mesh": config.mesh.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "train.optimizer": config.train.optimizer,
        "train.dtype": config.train.dtype,
    }


def _all(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step-*") if p.suffix != ".partial" and (p / FACTS).exists()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
