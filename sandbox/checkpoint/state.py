"""A trainer's state as pieces of logical tensors: parameters, and what the optimizer keeps for each of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sandbox.checkpoint.storage import Piece, Stored
from sandbox.errors import CheckpointError
from sandbox.layout import Layout, local
from sandbox.trainer import Trainer

__all__ = ["held", "put", "wanted"]

SCALAR = Layout.whole(())


def held(trainer: Trainer, *, copy: bool) -> dict[str, Piece]:
    """The pieces of this rank, on the CPU, by `parameters/NAME` and `optimizer/NAME/FIELD`; `copy`: none shares memory.

    Of ranks that hold the same piece of one cut (`Layout.copy`), only the first has it. Raises CheckpointError: the
    optimizer keeps something for a tensor that is none of the program's parameters, and would be lost.
    """
    kept = _keeper(trainer).state
    _see_that_all_is_claimed(trainer, kept)
    place = {axis: trainer.mesh.axis(axis).rank for axis in trainer.mesh.degrees}
    alone = tuple(place.values())
    pieces = {}
    for name, param in trainer.program.parameters.items():
        layout = trainer.program.layout[name]
        if layout.copy or not layout.numel:
            continue
        family = tuple(rank for axis, rank in place.items() if axis not in layout.sharded)
        pieces[f"parameters/{name}"] = Piece(layout, _staged(param, copy), family)
        for field, value in kept.get(param, {}).items():
            if isinstance(value, Tensor):
                pieces[f"optimizer/{name}/{field}"] = Piece(
                    layout if value.dim() else SCALAR, _staged(value, copy), family if value.dim() else alone
                )
    return pieces


def wanted(trainer: Trainer, stored: Mapping[str, Stored]) -> dict[str, Piece]:
    """Empty pieces for all that this rank needs of a checkpoint. Raises CheckpointError: it holds less."""
    layout, params = trainer.program.layout, trainer.program.parameters
    fields = sorted({name.rpartition("/")[2] for name in stored if name.startswith("optimizer/")})
    needed = {f"parameters/{name}": layout[name] for name, param in params.items() if layout[name].numel}
    needed |= {f"optimizer/{name}/{field}": layout[name] for name, _ in _updated(trainer) for field in fields}
    if absent := needed.keys() - stored.keys():
        raise CheckpointError(f"it holds no {min(absent)}.")
    return {
        name: Piece.empty(whole if stored[name].shape else SCALAR, stored[name].dtype) for name, whole in needed.items()
    }


def put(trainer: Trainer, pieces: Mapping[str, Piece]) -> None:
    """Make these pieces the trainer's state."""
    fused, kept = dict(_updated(trainer)), _keeper(trainer).state
    with torch.no_grad():
        for key, piece in pieces.items():
            kind, name, *field = key.split("/")
            param = trainer.program.parameters[name]
            if kind == "parameters":
                local(param).copy_(piece.local)
            else:
                kept[param][field[0]] = _like(param, piece.local, on_device=fused[name])
    trainer.program.refresh()


def _updated(trainer: Trainer) -> Iterator[tuple[str, bool]]:
    """Names of the parameters whose state this rank keeps; and whether in full on the device, down to the numbers."""
    names = {param: name for name, param in trainer.program.parameters.items()}
    for group in _keeper(trainer).param_groups:
        for param in group["params"]:
            if param not in names:
                raise _unclaimed(trainer, "its state")
            yield names[param], bool(group.get("fused"))


def _keeper(trainer: Trainer) -> Any:
    """Who has groups and state by the program's parameters, of this rank's share.

    DeepSpeed's works on flat tensors, and tells it; ZeroRedundancyOptimizer and OSS have an optimizer of that inside.
    """
    optimizer: Any = trainer.optimizer
    return getattr(optimizer, "by_parameter", None) or getattr(optimizer, "optim", optimizer)


def _see_that_all_is_claimed(trainer: Trainer, kept: Mapping[Any, Mapping[str, Any]]) -> None:
    """Raises CheckpointError: state that would have no logical name, or not everywhere."""
    params = trainer.program.parameters
    ours, updated = set(params.values()), [params[name] for name, _ in _updated(trainer)]
    tensors = {param: {f for f, value in state.items() if isinstance(value, Tensor)} for param, state in kept.items()}
    for field in sorted(set().union(*tensors.values())):
        foreign = any(field in found for param, found in tensors.items() if param not in ours)
        if foreign or any(field not in tensors.get(param, ()) for param in updated):
            raise _unclaimed(trainer, field)


def _unclaimed(trainer: Trainer, what: str) -> CheckpointError:
    return CheckpointError(
        f"engine {trainer.config.engine}: its optimizer keeps {what} by other tensors than the parameters, which no "
        "other layout could find. Set run.checkpoint_every: 0."
    )


def _staged(value: Tensor, copy: bool) -> Tensor:
    return local(value.detach()).to("cpu", copy=copy)


def _like(param: Tensor, value: Tensor, *, on_device: bool) -> Tensor:
    """`value` as the optimizer keeps it: on the parameter's device, and a DTensor if the parameter is one."""
    if not value.dim():
        return value.to(param.device) if on_device else value
    if local(param) is param:
        return value.to(param.device)
    from torch.distributed.tensor import DTensor

    assert isinstance(param, DTensor)
    return DTensor.from_local(
        value.to(param.device), param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
    )
