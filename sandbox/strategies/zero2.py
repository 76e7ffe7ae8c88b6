"""ZeRO stage 2: as stage 1, and a rank keeps only its part of the gradients.

    tensor            before        after backward      after reduction         after the step
    parameter W       W[N]          -                   -                       W[N]
    gradient  G       -             G[N]{U_dp}          G[N_dp]                 G[N_dp]
    optimizer M       M[N_dp]       -                   -                       M[N_dp]
    batch     X       X[B_dp, S]    -                   -                       -

N: elements of a bucket, all its parameters flattened end to end; `N_dp`: cut over dp and cp; `{U_dp}`: not yet summed.

Bytes sent by a rank in one step (n ranks, P bytes of parameters): (n-1)/n P to reduce_scatter the gradients of each of
M microbatches, and as much to all_gather the new parameters: (M + 1) (n-1)/n P. With `sync: last`, gradients add up
whole until the last microbatch: 2 (n-1)/n P, as stage 1. With replicas, 2 (r-1)/r P/n more, once a step.
Memory: parameters in full, 1/n of gradients and optimizer state (K: 2 for AdamW, 1 for SGD with momentum):
(1 + (1 + K)/n) P, and during backward the buckets under way.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, 5.2.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from sandbox.buckets import ScatterSum, reduce_in_backward
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program
from sandbox.strategies.zero1 import shard_optimizer, shard_traffic

AXIS = "dp"


class Options(Base):
    """Options of `zero2`."""

    bucket_mb: float = Field(25.0, gt=0, description="MiB of gradients that travel together")
    sync: Literal["each", "last"] = Field("each", description="reduce after each microbatch, or after the last only")


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with optimizer state and gradients cut over dp_shard x cp."""
    sharded, shards = shard_optimizer(program, mesh, options.bucket_mb)
    sums = ScatterSum([shard.axis for shard in shards], mesh.axis("dp_replicate"), shards[0].flat.dtype)

    def launch(number: int, final: bool) -> None:
        sums.launch(number, shards[number].bucket.take(), shards[number].partition.sizes, final)

    def finish(final: bool) -> None:
        if final:
            sums.finish()
            for number, shard in enumerate(shards):
                shard.set_grads(sums.sums.pop(number))

    return reduce_in_backward(sharded, [shard.bucket for shard in shards], launch, finish, each=options.sync == "each")


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    rounds = config.passes if options.sync == "each" else 1
    traffic, part = shard_traffic(model, mesh, options.bucket_mb, rounds)
    return Prediction(
        traffic=traffic,
        memory={
            "parameters": bytes_of(model.parameters()),
            "gradients": part,
            "optimizer": state_copies(config.train) * part,
        },
    )
