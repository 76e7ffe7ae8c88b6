"""Accelerate's default: `prepare` wraps the model in torch's DDP, `accumulate` synchronises with the last microbatch.

    tensor            before        after backward      after reduction
    parameter W       W[D, F]       -                   W[D, F]           replicated over dp
    gradient  G       -             G[D, F]{U_dp}       G[D, F]           a partial sum, then averaged
    optimizer M       M[D, F]       -                   M[D, F]           replicated over dp
    batch     X       X[B_dp, S]    -                   -                 rows cut over dp

`X[B_dp, S]` reads: B is cut over axis dp; `{U_dp}`: not yet summed over dp.

Bytes sent by a rank in one step: 2 (n-1)/n P to all_reduce P bytes of gradients over n ranks, and M times that if every
one of M microbatches is synchronised (`sync_each_batch`). Memory: parameters, gradients and optimizer state in full.

`backward` divides the loss by M whatever the microbatches hold, a mean of means where their counts of valid tokens
differ. Here the loss is a share of the global sum, and is multiplied by M before.

Source: Accelerate 1.15; Li et al., "PyTorch Distributed", VLDB 2020.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import nn

from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.engines.accelerate._accelerator import (
    accumulate,
    clip_with,
    forget_launcher,
    make_accelerator,
    with_hooks,
)
from sandbox.engines.torch import ddp
from sandbox.mesh import Mesh
from sandbox.predict import Prediction
from sandbox.program import Program, materialise, shard_rows

AXIS = "dp"


class Options(Base):
    """Options of `ddp`."""

    bucket_mb: float = Field(25.0, gt=0, description="MiB of gradients that travel together")
    sync: Literal["last", "each"] = Field("last", description="reduce after the last microbatch, or sync_each_batch")


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with model and optimizer prepared by Accelerate."""
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    forget_launcher()
    microbatches = program.config.train.microbatches
    accelerator = make_accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=microbatches, sync_each_batch=options.sync == "each"
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=options.bucket_mb, gradient_as_bucket_view=True)],
    )
    parameters = materialise(program)
    whole = replace(program, parameters=parameters)
    model, optimizer = accelerator.prepare(program.model, program.make_optimizer(whole))
    return replace(
        program,
        model=model,
        parameters=parameters,
        shard_batch=shard_rows(program, mesh),
        forward_backward=accumulate(accelerator, program, mesh),
        make_optimizer=lambda finished: with_hooks(optimizer),
        clip=lambda finished, most: clip_with(accelerator, parameters, most),
    )


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank: those of torch's DDP."""
    return ddp.predict(model, mesh, ddp.Options(sync=options.sync), config)
