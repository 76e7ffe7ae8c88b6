"""Distributed data parallelism: every rank holds the whole model and a part of the batch.

    tensor            before        after backward      after reduction
    parameter W       W[D, F]       -                   W[D, F]           replicated over dp
    gradient  G       -             G[D, F]{U_dp}       G[D, F]           a partial sum, then summed
    optimizer M       M[D, F]       -                   M[D, F]           replicated over dp
    batch     X       X[B_dp, S]    -                   -                 rows cut over dp

`X[B_dp, S]` reads: B is cut over axis dp; `{U_dp}`: not yet summed over dp.

Bytes sent by a rank in one step: 2 (n-1)/n P, the least an all-reduce can send (n ranks, P bytes of gradients), and M
times that if every one of M microbatches is synchronised. Memory: parameters, gradients and optimizer state in full.
The flat tensors of the gradients stay from step to step, unless every microbatch is synchronised.

The sum is taken over dp x cp: parameters are replicated over both. Of experts that are cut over ep, a part of dp, it is
taken over the rest.

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from sandbox.buckets import cut_buckets, reduce_in_backward, summed_over
from sandbox.comm import Pending, all_reduce, ring_bytes
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, materialise, shard_rows

AXIS = "dp"
AXES = ("dp_replicate", "dp_shard", "ep", "cp")


class Options(Base):
    """Options of `ddp`."""

    bucket_mb: float = Field(25.0, gt=0, description="MiB of gradients that travel together")
    sync: Literal["last", "each"] = Field("last", description="reduce after the last microbatch (no_sync), or each one")


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with its rows cut over dp and its gradients summed over dp x cp."""
    over = summed_over(program.model, mesh, *AXES)
    params = materialise(program)
    buckets = cut_buckets(params, options.bucket_mb, over, lasting=options.sync == "last")
    reduced: dict[int, Tensor] = {}  # sums of earlier microbatches, with sync "each"
    pending: list[tuple[int, Pending]] = []

    def launch(number: int, final: bool) -> None:
        pending.append((number, all_reduce(buckets[number].take(), over(buckets[number].first))))

    def finish(final: bool) -> None:
        for number, reduction in pending:
            total = reduction.wait()
            reduced[number] = reduced[number].add_(total) if number in reduced else total
        pending.clear()
        if final:
            for number, bucket in enumerate(buckets):
                for name, view in bucket.views(reduced.pop(number)).items():
                    params[name].grad = view

    local = replace(program, parameters=params, shard_batch=shard_rows(program, mesh))
    return reduce_in_backward(local, buckets, launch, finish, each=options.sync == "each")


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    over, params = summed_over(model, mesh, *AXES), dict(model.named_parameters())
    whole = bytes_of(params.values())
    rounds = config.passes if options.sync == "each" else 1
    traffic: dict[str, float] = defaultdict(float)
    for bucket in cut_buckets(params, options.bucket_mb, over):
        axis = over(bucket.first)
        traffic[f"all_reduce {axis.name}"] += rounds * ring_bytes(bytes_of(bucket.params.values()), axis.size)
    return Prediction(
        traffic=traffic,
        memory={"parameters": whole, "gradients": whole, "optimizer": state_copies(config.train) * whole},
    )
