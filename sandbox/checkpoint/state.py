"""A trainer's state as pieces of logical tensors: parameters, and what the optimizer keeps for each of them."""

from collections.abc import Iterator, Mapping

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

    Of ranks that hold the same piece of one cut (`Layout.copy`), only the first has it.
    """
    place = {axis: trainer.mesh.axis(axis).rank for axis in trainer.mesh.degrees}
    alone = tuple(place.values())
    pieces = {}
    for name, param in trainer.program.parameters.items():
        layout = trainer.program.layout[name]
        if layout.copy or not layout.numel:
            continue
        family = tuple(rank for axis, rank in place.items() if axis not in layout.sharded)
        pieces[f"parameters/{name}"] = Piece(layout, _staged(param, copy), family)
        for field, value in trainer.optimizer.state.get(param, {}).items():
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
    fused = dict(_updated(trainer))
    with torch.no_grad():
        for key, piece in pieces.items():
            kind, name, *field = key.split("/")
            param = trainer.program.parameters[name]
            if kind == "parameters":
                local(param).copy_(piece.local)
            else:
                trainer.optimizer.state[param][field[0]] = _like(param, piece.local, on_device=fused[name])
    trainer.program.refresh()


def _updated(trainer: Trainer) -> Iterator[tuple[str, bool]]:
    """Names of the parameters whose state this rank keeps; and whether in full on the device, down to the numbers."""
    names = {param: name for name, param in trainer.program.parameters.items()}
    inner = getattr(trainer.optimizer, "optim", trainer.optimizer)  # ZeroRedundancyOptimizer's own knows its share
    for group in inner.param_groups:
        for param in group["params"]:
            yield names[param], bool(group.get("fused"))


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
