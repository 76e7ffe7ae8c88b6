"""ZeRO stage 1: every rank holds the whole model and all gradients, but updates only its part of the parameters.

    tensor            before        after backward      after reduction         after the step
    parameter W       W[N]          -                   -                       W[N]
    gradient  G       -             G[N]{U_dp}          own range: G[N_dp]      -
    optimizer M       M[N_dp]       -                   -                       M[N_dp]
    batch     X       X[B_dp, S]    -                   -                       -

N: elements of a bucket, all its parameters flattened end to end; `N_dp`: cut over dp; `{U_dp}`: not yet summed. The n
ranks of a cut are those of dp and cp, which hold the same parameters; r replicas of them sum their parts.

Bytes sent by a rank in one step: (n-1)/n P to reduce_scatter the gradients and (n-1)/n P to all_gather the new
parameters, together what an all_reduce sends (P bytes of parameters). With replicas, 2 (r-1)/r P/n more.
Memory: parameters and gradients in full, 1/n of the optimizer's state: (2 + K/n) P, where K is 2 for AdamW, and 1 for
SGD with momentum.

The parameters of a bucket lie in one flat tensor, so that gathering writes them where they are used: no copies.
Experts that are cut over ep, a part of dp, have buckets of their own, cut over the rest of dp.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, 5.1.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor, nn

from sandbox.buckets import Bucket, ScatterSum, cut_buckets, reduce_in_backward, summed_over
from sandbox.comm import Axis, Pending, all_gather, own_part, ring_bytes
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.layout import Layout
from sandbox.mesh import Mesh
from sandbox.partition import Partition, by_ranges
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, materialise, shard_rows

AXIS = "dp"
AXES = ("dp_shard", "ep", "cp")


class Options(Base):
    """Options of `zero1`."""

    bucket_mb: float = Field(25.0, gt=0, description="MiB of gradients that travel together")


@dataclass(frozen=True)
class Shard:
    """A bucket of the model's parameters in one flat tensor [N], and this rank's range of it [N_dp]."""

    bucket: Bucket
    partition: Partition
    axis: Axis
    flat: Tensor
    pieces: dict[str, nn.Parameter]  # views of `flat`: what the optimizer updates is what the model uses

    @classmethod
    def of(cls, bucket: Bucket, axis: Axis) -> "Shard":
        """Move the bucket's parameters into one flat tensor."""
        partition = by_ranges(bucket.params, axis.size)
        flat = torch.cat([p.detach().flatten() for p in bucket.params.values()])  # ranges in rank order are all of it
        for name, view in bucket.views(flat).items():
            bucket.params[name].data = view
        part = own_part(flat, partition.sizes, axis)
        pieces = {name: nn.Parameter(view) for name, view in partition.pieces(part, axis.rank).items()}
        return cls(bucket, partition, axis, flat, pieces)

    def gather(self) -> Pending:
        """Bring the parts that other ranks have updated."""
        return all_gather(self.flat, self.partition.sizes, self.axis)

    def layouts(self, program: Program) -> Iterator[tuple[str, Layout]]:
        """Where each piece lies."""
        for name in self.pieces:
            yield name, self.partition.layout(name, self.axis.rank, program.layout[name], self.axis.names)

    def set_grads(self, part: Tensor) -> None:
        """Give every piece its gradient: views of `part` [N_dp]."""
        for name, grad in self.partition.pieces(part, self.axis.rank).items():
            self.pieces[name].grad = grad


def shard_optimizer(
    program: Program, mesh: Mesh, megabytes: float, *, lasting: bool = False
) -> tuple[Program, list[Shard]]:
    """Cut what the optimizer updates over dp_shard x cp; after each step, gather the parameters.

    `lasting`: gradients are to stay whole.
    """
    over = summed_over(program.model, mesh, *AXES)
    buckets = cut_buckets(materialise(program), megabytes, over, lasting=lasting)
    shards = [Shard.of(bucket, over(bucket.first)) for bucket in buckets]

    def refresh() -> None:
        program.refresh()
        for gather in [shard.gather() for shard in shards]:
            gather.wait()

    sharded = replace(
        program,
        parameters={name: piece for shard in shards for name, piece in shard.pieces.items()},
        layout=dict(pair for shard in shards for pair in shard.layouts(program)),
        shard_batch=shard_rows(program, mesh),
        refresh=refresh,
    )
    return sharded, shards


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with the optimizer's state cut over dp_shard x cp."""
    sharded, shards = shard_optimizer(program, mesh, options.bucket_mb, lasting=True)
    sums = ScatterSum([shard.axis for shard in shards], mesh.axis("dp_replicate"), shards[0].flat.dtype)
    full: dict[int, Tensor] = {}  # gradients stay whole in stage 1

    def launch(number: int, final: bool) -> None:
        shard = shards[number]
        full[number] = shard.bucket.take()
        for name, view in shard.bucket.views(full[number]).items():
            shard.bucket.params[name].grad = view
        sums.launch(number, full[number], shard.partition.sizes, final)

    def finish(final: bool) -> None:
        sums.finish()
        for number, shard in enumerate(shards):
            own = own_part(full.pop(number), shard.partition.sizes, shard.axis)
            shard.set_grads(own.copy_(sums.sums.pop(number)))

    return reduce_in_backward(sharded, [shard.bucket for shard in shards], launch, finish, each=False)


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    traffic, part = shard_traffic(model, mesh, options.bucket_mb, rounds=1)
    whole = bytes_of(model.parameters())
    return Prediction(
        traffic=traffic,
        memory={"parameters": whole, "gradients": whole, "optimizer": state_copies(config.train) * part},
    )


def shard_traffic(model: nn.Module, mesh: Mesh, megabytes: float, rounds: int) -> tuple[dict[str, float], int]:
    """Bytes by collective if gradients are reduced `rounds` times a step, and bytes of this rank's part."""
    over, replicate = summed_over(model, mesh, *AXES), mesh.axis("dp_replicate")
    traffic: dict[str, float] = defaultdict(float)
    part = 0
    for bucket in cut_buckets(dict(model.named_parameters()), megabytes, over):
        axis, whole = over(bucket.first), bytes_of(bucket.params.values())
        own = by_ranges(bucket.params, axis.size).sizes[axis.rank] * bucket.params[bucket.first].element_size()
        traffic[f"reduce_scatter {axis.name}"] += rounds * (whole - own)
        traffic[f"all_gather {axis.name}"] += (axis.size - 1) * own
        traffic[f"all_reduce {replicate.name}"] += ring_bytes(own, replicate.size)
        part += own
    return traffic, part
