"""torch.distributed.optim.ZeroRedundancyOptimizer around DDP: the optimizer's state cut by whole parameters.

    tensor            before        after backward      after reduction         after the step
    parameter W       W[D, F]       -                   -                       W[D, F]
    gradient  G       -             G[D, F]{U_dp}       G[D, F]                 -
    optimizer M       M[D, F]@r     -                   -                       M[D, F]@r
    batch     X       X[B_dp, S]    -                   -                       -

`M[D, F]@r`: whole, on one rank of dp only, the parameter's owner; `{U_dp}`: not yet summed over dp.

Bytes sent by a rank in one step: 2 (n-1)/n P to all_reduce gradients (n ranks, P bytes), and (n-1) times the bytes of
the parameters that it owns to broadcast what it has updated. Together half as much again as our zero1, which sends no
rank gradients that it does not need. With replicas, owners are ranks of dp_shard. Memory: parameters and gradients in
full, and the state of the parameters owned.

Owners, matrices first and then vectors (they differ in weight decay): the largest parameter left goes to the rank that
owns the fewest elements so far. No parameter is cut, so one large embedding makes the parts uneven.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, 5.1.
"""

from dataclasses import replace

import torch
from pydantic import Field
from torch import nn

from sandbox.config import Config
from sandbox.engines.torch import ddp
from sandbox.errors import ConfigError
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, state_copies
from sandbox.program import Program

AXIS = "dp"


class Options(ddp.Options):
    """Options of `zero1`."""

    parameters_as_bucket_view: bool = Field(True, description="one broadcast an owner, not one a parameter")


def check(config: Config, options: Options) -> None:
    """Refuse DTensors, which `replicate` makes of parameters (ddp.py): what is broadcast are plain ones."""
    if others := [axis for axis in ("pp", "tp") if getattr(config.mesh, axis).degree > 1]:
        raise ConfigError(
            f"mesh.{others[0]}: torch's ZeroRedundancyOptimizer broadcasts plain tensors, not the DTensors that other "
            "axes make of parameters. Set mesh.dp.strategy: fsdp, or ddp."
        )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` under DDP, with the optimizer's state cut over dp_shard x cp."""
    axis = mesh.axis("dp_shard", "cp")

    def make_optimizer(finished: Program) -> torch.optim.Optimizer:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # here, for it takes 1 s

        whole = program.make_optimizer(finished)
        if axis.size == 1:
            return whole
        optimizer = ZeroRedundancyOptimizer(
            whole.param_groups,  # with all their settings
            type(whole),
            process_group=axis.group,
            parameters_as_bucket_view=options.parameters_as_bucket_view,
            lr=program.config.train.lr,
        )
        optimizer.state = optimizer.optim.state  # that of the parameters owned, where one looks for it
        return optimizer

    return replace(ddp.apply(program, mesh, options), make_optimizer=make_optimizer)


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    axis = mesh.axis("dp_shard", "cp")
    replicated = ddp.predict(model, mesh, options, config)
    owned = owned_elements(model, axis.size)[axis.rank] * next(model.parameters()).element_size()
    return Prediction(
        traffic={**replicated.traffic, f"broadcast {axis.name}": (axis.size - 1) * owned},
        memory={**replicated.memory, "optimizer": state_copies(config.train) * owned},
    )


def owned_elements(model: nn.Module, ranks: int) -> list[int]:
    """Elements of the parameters that each rank owns, by torch's greedy rule."""
    owned = [0] * ranks
    for param in sorted(model.parameters(), key=lambda p: (p.dim() < 2, -p.numel())):
        owned[owned.index(min(owned))] += param.numel()
    return owned
