"""torch.nn.parallel.DistributedDataParallel: the model in full on every rank, gradients averaged by C++ hooks.

    tensor            before        after backward      after reduction
    parameter W       W[D, F]       -                   W[D, F]           replicated over dp
    gradient  G       -             G[D, F]{U_dp}       G[D, F]           a partial sum, then averaged
    optimizer M       M[D, F]       -                   M[D, F]           replicated over dp
    batch     X       X[B_dp, S]    -                   -                 rows cut over dp

`X[B_dp, S]` reads: B is cut over axis dp; `{U_dp}`: not yet summed over dp.

Bytes sent by a rank in one step: 2 (n-1)/n P to all_reduce P bytes of gradients over n ranks, and M times that if every
one of M microbatches is synchronised. After the first backward, once, rank 0 broadcasts the order of the gradients.
Memory: parameters, gradients and optimizer state in full, and P more for buckets without `gradient_as_bucket_view`.

DDP averages, and the loss is already a share of the global sum, so each rank's loss is scaled by n. A communication
hook that sums would be wrong with `sync: each`: DDP reduces what has ACCUMULATED in a gradient, so the sum over ranks
of earlier microbatches would count n times, where their average stays as it is.

Beside tensor or pipeline parallelism it knows neither DTensors nor a backward in two parts, and torch's `replicate`
takes its place: FSDP that cuts nothing, which sums the gradients of a block, or of what is left of the model or the
stage, at once. It sends the same bytes; `bucket_mb` and `gradient_as_bucket_view` are DDP's alone.

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sandbox.batch import Batch
from sandbox.comm import ring_bytes
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.engines.torch._dtensors import adopt, units
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, materialise, shard_rows

AXIS = "dp"


class Options(Base):
    """Options of `ddp`."""

    bucket_mb: float = Field(25.0, gt=0, description="MiB of gradients that travel together")
    sync: Literal["last", "each"] = Field("last", description="reduce after the last microbatch (no_sync), or each one")
    gradient_as_bucket_view: bool = Field(True, description="gradients lie in the buckets: no copies, no second memory")


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with its rows cut over dp and its gradients summed over dp."""
    others = mesh.axis("pp", "tp").size > 1
    return (beside_others if others else of_plain_tensors)(program, mesh, options)


def of_plain_tensors(program: Program, mesh: Mesh, options: Options) -> Program:
    """`apply` by torch's DistributedDataParallel."""
    axis = mesh.data
    parameters = materialise(program)
    model = DistributedDataParallel(
        program.model,
        process_group=axis.group,
        init_sync=False,  # every rank has made the same values from their names
        bucket_cap_mb=options.bucket_mb,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
    )

    def begin(final: bool) -> None:
        program.begin(final)
        model.require_backward_grad_sync = final or options.sync == "each"  # all that `model.no_sync()` does

    def forward_backward(finished: Program, microbatches: list[Batch], valid: float) -> Tensor:
        return program.forward_backward(finished, microbatches, valid / axis.size) / axis.size

    return replace(
        program,
        model=model,
        parameters=parameters,
        shard_batch=shard_rows(program, mesh),
        forward_backward=forward_backward,
        begin=begin,
    )


def beside_others(program: Program, mesh: Mesh, options: Options) -> Program:
    """`apply` for DTensors and for stages of a pipeline: torch's `replicate`."""
    from torch.distributed._composable.replicate_with_fsdp import ReplicateModule, replicate

    for module in units(program.model):
        unit = replicate(module, mesh=mesh.data_mesh)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    adopted = adopt(program, mesh, program.layout)

    def begin(final: bool) -> None:
        program.begin(final)
        if isinstance(adopted.model, ReplicateModule):  # else stages, of which the pipeline does it itself
            adopted.model.set_requires_gradient_sync(final or options.sync == "each")

    return replace(adopted, shard_batch=shard_rows(program, mesh), begin=begin)


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    axis, whole = mesh.data, bytes_of(model.parameters())
    rounds = config.passes if options.sync == "each" else 1
    return Prediction(
        traffic={f"all_reduce {axis.name}": rounds * ring_bytes(whole, axis.size)},
        memory={"parameters": whole, "gradients": whole, "optimizer": state_copies(config.train) * whole},
    )
