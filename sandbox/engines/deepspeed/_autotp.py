"""What AutoTP cuts, and an engine whose linears are AutoTP's where the mesh has an axis tp.

DeepSpeed cuts as its engine starts, and that is one for tp and dp: the strategy that is folded last starts it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from sandbox.config import Config
from sandbox.engines.deepspeed import _cpu_adam, _engine
from sandbox.mesh import Mesh
from sandbox.partition import even
from sandbox.program import Program, materialise

__all__ = ["NORMS", "cut_in", "cuts", "start"]

COLUMNS, ROWS = ("q", "k", "v", "gate", "up"), ("o", "down")
NORMS = ("q_norm", "k_norm")


def start(
    program: Program, mesh: Mesh, zero: Mapping[str, Any], initialize: Callable[..., Any] = _engine.initialize
) -> tuple[Program, Any, torch.optim.Optimizer]:
    """Return `program` with what this rank has of each parameter, an engine around its model, and its optimizer.

    `zero` is the section `zero_optimization` of the engine's config. `initialize` makes the engine.
    """
    axis, model, layout = mesh.axis("tp"), program.model, dict(program.layout)
    parameters = materialise(program)
    ours = program.make_optimizer(replace(program, parameters=parameters))
    inner = _cpu_adam.optimizer(ours, offload="offload_optimizer" in zero)
    if axis.size == 1:
        whole = replace(program, parameters=parameters)
        return whole, initialize(program, inner, zero), inner
    model.config = SimpleNamespace(num_key_value_heads=program.config.model.groups)  # type: ignore[assignment]
    tensor_parallel = {"autotp_size": axis.size, "partition_config": partition()}
    shapes = {name: param.shape for name, param in parameters.items()}
    engine = initialize(program, inner, zero, tensor_parallel=tensor_parallel)
    engine.first_dataloader_check.remove()  # compares inputs over ranks, and knows tensors only
    for name, shape in shapes.items():
        if how := cut_in(name):
            dim = int(how == "row")
            sizes = cuts(shape[dim], name, program.config, axis.size)
            begin = sum(sizes[: axis.rank])
            layout[name] = layout[name].cut(dim, begin, begin + sizes[axis.rank], axis.names)
    for name, param in model.named_parameters():
        held = getattr(param, "ds_shape", param.shape)  # stage 3 has cut it once more
        assert held == layout[name].size, f"AutoTP cuts {name} otherwise: {tuple(held)}"
    return replace(program, parameters=parameters, layout=layout), engine, inner


def partition() -> dict[str, Any]:
    """What is cut and how, as DeepSpeed reads it."""

    def ending(names: tuple[str, ...], kinds: str) -> list[str]:
        return [rf".*\.({'|'.join(names)})\.({kinds})$"]

    return {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": ending(COLUMNS, "weight"), "partition_type": "column"},
            {"patterns": ending(ROWS, "weight"), "partition_type": "row"},
            {"patterns": ending(NORMS, "weight|bias"), "partition_type": "skip", "grad_allreduce": True},
        ],
    }


def cut_in(name: str) -> str:
    """How a parameter is cut: "column", "row", or not, ""."""
    *_, layer, kind = name.split(".")
    return "column" if layer in COLUMNS else "row" if layer in ROWS and kind == "weight" else ""


def cuts(size: int, name: str, config: Config, ranks: int) -> list[int]:
    """Rows or columns of each rank: of attention whole key/value heads, of the MLP as even as can be."""
    if "mlp" in name:
        return even(size, ranks)
    groups = config.model.groups
    return [size // groups * held for held in even(groups, ranks)]
