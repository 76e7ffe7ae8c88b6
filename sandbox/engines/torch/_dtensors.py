"""What strategies of this engine share whose parameters are torch's DTensors, or that a pipeline's stages run."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from sandbox.config import Config
from sandbox.layout import Layout
from sandbox.mesh import Mesh
from sandbox.model import Transformer
from sandbox.partition import even
from sandbox.program import Program, make_optimizer, replace_parameters

__all__ = [
    "adds_up", "adopt", "casts", "microbatch_rows", "own_rows", "reductions", "retie", "stages_of", "units",
]  # fmt: skip


def adopt(program: Program, mesh: Mesh, layout: Mapping[str, Layout]) -> Program:
    """Return `program` with a value for every parameter of its model, all DTensors, and what follows from that.

    The norm is torch's own, if one axis is all there is. Over two it sums one after the other, tensor by tensor, and
    over the stages of a pipeline it has none: there ours asks each layout instead.
    """
    from torch.distributed.tensor import DTensor

    def clip(finished: Program, most: float | None) -> Tensor:
        norm = nn.utils.clip_grad_norm_(finished.parameters.values(), math.inf if most is None else most)
        assert isinstance(norm, DTensor)
        return norm.full_tensor().double()

    retie(program)
    alone = mesh.axis("pp", "tp").size == 1 or mesh.axis("tp").size == mesh.world
    parameters = dict[str, nn.Parameter]()
    for name, meta in program.model.named_parameters():
        assert isinstance(meta, DTensor)
        piece = layout[name].take(program.initial(name)).clone()  # one parameter whole at a time
        parameters[name] = nn.Parameter(
            DTensor.from_local(piece, meta.device_mesh, meta.placements, shape=meta.shape, stride=meta.stride())
        )
    replace_parameters(program.model, parameters)  # `to_empty` would untie tied weights
    return replace(
        program,
        parameters=parameters,
        layout=layout,
        clip=clip if alone else program.clip,
        make_optimizer=lambda finished: make_optimizer(finished, fused=program.config.train.optimizer == "adamw"),
    )  # for DTensors torch has no fused SGD


def retie(program: Program) -> None:
    """Let embedding and head share their weight again, if they do: who cuts module by module gives each its own."""
    model = program.model
    if isinstance(model, Transformer) and model.head is not None and "head.weight" not in program.layout:
        cast(nn.Embedding, model.embed).weight = model.head.weight


def stages_of(model: nn.Module) -> list[nn.Module]:
    """What a data strategy wraps: the stages that a pipeline cut this rank's model into, or the model."""
    return getattr(model, "stages", [model])


def units(model: nn.Module) -> list[nn.Module]:
    """What FSDP gathers, and reduces, at a time: each block, and what is left of the model or of each stage."""
    return [module for stage in stages_of(model) for module in (*stage.get_submodule("blocks").children(), stage)]


def microbatch_rows(mesh: Mesh, config: Config) -> list[int]:
    """Rows of each microbatch on this rank. Those of a pipeline are filled up to one size."""
    count = config.train.microbatches
    rows = even(even(config.train.batch, mesh.data.size)[mesh.data.rank], count)
    return [rows[0]] * count if config.mesh.pp.degree > 1 else rows


def reductions(config: Config) -> int:
    """How often the data strategy reduces gradients in a step."""
    return config.passes if _each(config) else 1


def casts(config: Config) -> bool:
    """Whether the model meets its parameters in the dtype that it computes in: as FSDP gathers them."""
    return config.mesh.dp.degree > 1 and config.mesh.dp.strategy == "fsdp"


def adds_up(config: Config) -> bool:
    """Whether gradients wait, in the parameters' own dtype, for those of other microbatches: in a pipeline always."""
    return config.mesh.pp.degree > 1 or (config.train.microbatches > 1 and not _each(config))


def _each(config: Config) -> bool:
    default = "each" if config.mesh.dp.strategy == "fsdp" else "last"
    return config.mesh.dp.degree > 1 and config.mesh.dp.options.get("sync", default) == "each"


def own_rows(rows: int, ranks: int, rank: int) -> int:
    """Rows of a chunk of `torch.chunk`: equal but for the last ones."""
    chunk = -(-rows // ranks)
    return max(0, min(chunk, rows - rank * chunk))
