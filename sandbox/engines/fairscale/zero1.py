"""FairScale's OSS under torch's DDP: the optimizer's state cut by whole parameters, each with one owner.

    tensor            before        after backward      after reduction         after the step
    parameter W       W[D, F]       -                   -                       W[D, F]
    gradient  G       -             G[D, F]{U_dp}       G[D, F]                 -
    optimizer M       M[D, F]@r     -                   -                       M[D, F]@r
    batch     X       X[B_dp, S]    -                   -                       -

`M[D, F]@r`: whole, on one rank of dp only, the parameter's owner; `{U_dp}`: not yet summed over dp.

Bytes sent by a rank in one step: 2 (n-1)/n P to all_reduce gradients (n ranks, P bytes), and (n-1) times the bytes of
the parameters that it owns to broadcast what it has updated, all in one buffer. Memory: parameters and gradients in
full, and the state of the parameters owned.

Owners: each parameter, matrices first and then vectors, goes to the rank with the fewest elements so far, in the order
of the model and not by size, so parts are less even than those of torch's ZeroRedundancyOptimizer.

The norm is OSS's own. It asks for float32 and fails on float64, and over tensor parallelism it counts what ranks share
once for each of them; there the sandbox's stands in for it.

Source: FairScale 0.4.13; Rajbhandari et al., "ZeRO", SC 2020, 5.1.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sandbox.comm import Axis
from sandbox.config import Config
from sandbox.engines.torch import ddp
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, state_copies
from sandbox.program import Program

AXIS = "dp"


class Options(ddp.Options):
    """Options of `zero1`: those of torch's DDP."""


def check(config: Config, options: Options) -> None:
    """Raises UnsupportedError: replicas, over which OSS would count the norm again."""
    if config.mesh.dp.replicas > 1:
        raise UnsupportedError(
            "mesh.dp.replicas: OSS.clip_grad_norm sums over all ranks and not over its group, so replicas would be "
            "counted again. Set mesh.dp.replicas: 1."
        )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` under DDP, with the optimizer's state cut over dp x cp."""
    replicated = ddp.of_plain_tensors(program, mesh, options)
    optimizer = make_oss(replicated, mesh.axis("dp_shard", "cp"))
    return replace(replicated, make_optimizer=lambda finished: optimizer, clip=clip_with(optimizer, program, mesh))


def make_oss(program: Program, axis: Axis) -> Any:
    """The program's optimizer, inside an OSS over `axis`."""
    from fairscale.optim import OSS

    warnings.filterwarnings("ignore", ".*_get_global_rank` is deprecated", FutureWarning)  # and used by FairScale
    whole = program.make_optimizer(program)
    optimizer = OSS(whole.param_groups, type(whole), group=axis.group, lr=program.config.train.lr)
    optimizer.state = optimizer.optim.state  # that of the parameters owned, where one looks for it
    return optimizer


def clip_with(oss: Any, program: Program, mesh: Mesh) -> Callable[[Program, float | None], Tensor]:
    """The slot `clip` by OSS; by `program` where OSS has no norm: without clipping, in float64, and over tp."""
    own = program.config.train.dtype != "float64" and mesh.axis("tp").size == 1

    def clip(finished: Program, most: float | None) -> Tensor:
        if most is None or not own:
            return program.clip(finished, most)
        norm: Tensor = oss.clip_grad_norm(most)
        return norm.double()

    return clip


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    axis = mesh.axis("dp_shard", "cp")
    replicated = ddp.predict(model, mesh, options, config)
    owned = owned_bytes(model, axis)
    return Prediction(
        traffic={**replicated.traffic, f"broadcast {axis.name}": (axis.size - 1) * owned},
        memory={**replicated.memory, "optimizer": state_copies(config.train) * owned},
    )


def owners(model: nn.Module, ranks: int) -> dict[str, int]:
    """The rank that owns each parameter, as `OSS.partition_parameters` deals them out."""
    params = dict(model.named_parameters())
    sizes, owner = [0] * ranks, {}
    for name in sorted(params, key=lambda name: params[name].dim() < 2):
        owner[name] = sizes.index(min(sizes))
        sizes[owner[name]] += params[name].numel()
    return owner


def owned_bytes(model: nn.Module, axis: Axis) -> int:
    """Bytes of the parameters that this rank owns."""
    owner = owners(model, axis.size)
    return sum(p.numel() * p.element_size() for n, p in model.named_parameters() if owner[n] == axis.rank)
