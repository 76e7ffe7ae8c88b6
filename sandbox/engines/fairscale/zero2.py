"""FairScale's ShardedDDP with OSS: each gradient is summed at the one rank that owns the parameter, and kept there.

    tensor            before        after backward      after reduction         after the step
    parameter W       W[D, F]       -                   -                       W[D, F]
    gradient  G       -             G[D, F]{U_dp}       G[D, F]@r               -
    optimizer M       M[D, F]@r     -                   -                       M[D, F]@r
    batch     X       X[B_dp, S]    -                   -                       -

`G[D, F]@r`: whole, on one rank of dp only, the parameter's owner (zero1.py tells which); `{U_dp}`: not yet summed.

Bytes sent by a rank of n in one step: those of all gradients that it does not own, to reduce them to their owners, and
(n-1) times those of the parameters that it owns to broadcast what it has updated. Memory: parameters in full; gradients
and optimizer state of the parameters owned.

ShardedDDP averages, and the loss is already a share of the global sum, so each rank's loss is scaled by n. Gradients
are reduced one by one: `reduce_buffer_size`, FairScale's default, keeps small ones in a buffer whose link to the
parameters is lost when gradients are set to None, as torch does, and training is wrong from the second step on. And
only the last microbatch is reduced, as under `no_sync`: to reduce each one divides by n what is already the sum.

An owner drops the gradient that was reduced to it, if its rank in the group is not its rank in the world, as beside
tensor parallelism: ShardedDDP takes it for another. Here it is told its rank in the group.

Source: FairScale 0.4.13; Rajbhandari et al., "ZeRO", SC 2020, 5.2.
"""

from dataclasses import replace

from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.engines.fairscale.zero1 import clip_with, make_oss, owned_bytes, owners
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, materialise, shard_rows, unless_stepped

AXIS = "dp"


class Options(Base):
    """Options of `zero2`: none."""


def check(config: Config, options: Options) -> None:
    """Raises UnsupportedError: replicas, over which ShardedDDP does not reduce."""
    if config.mesh.dp.replicas > 1:
        raise UnsupportedError(
            "mesh.dp.replicas: ShardedDDP reduces over one group, that of its owners. Set mesh.dp.replicas: 1."
        )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with gradients and optimizer state at their parameters' owners."""
    from fairscale.nn.data_parallel import ShardedDataParallel

    axis = mesh.axis("dp_shard", "cp")
    whole = replace(program, parameters=materialise(program))
    oss = make_oss(whole, axis)
    model = ShardedDataParallel(
        program.model, oss, axis.group, broadcast_buffers=False, sync_models_at_startup=False, reduce_buffer_size=0
    )
    model._global_rank = axis.rank  # what it holds owners' ranks against, and those are ranks of the group
    mine = [name for name, rank in owners(program.model, axis.size).items() if rank == axis.rank]

    def begin(final: bool) -> None:
        program.begin(final)
        model._should_accumulate_grads = not final  # all that `model.no_sync()` does

    def forward_backward(finished: Program, microbatches: list[Batch], valid: float) -> Tensor:
        return program.forward_backward(finished, microbatches, valid / axis.size) / axis.size

    return replace(
        program,
        model=model,
        parameters={name: whole.parameters[name] for name in mine},
        layout={name: replace(at, sharded=(*at.sharded, *axis.names)) for name, at in program.layout.items()},
        shard_batch=shard_rows(program, mesh),
        forward_backward=forward_backward,
        begin=begin,
        make_optimizer=lambda finished: oss,
        refresh=unless_stepped(oss, oss._broadcast_params),
        clip=clip_with(oss, program, mesh),
    )


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    axis = mesh.axis("dp_shard", "cp")
    whole, owned = bytes_of(model.parameters()), owned_bytes(model, axis)
    return Prediction(
        traffic={f"reduce {axis.name}": whole - owned, f"broadcast {axis.name}": (axis.size - 1) * owned},
        memory={"parameters": whole, "gradients": owned, "optimizer": state_copies(config.train) * owned},
    )
