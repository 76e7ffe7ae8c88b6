"""DeepSpeed's Ulysses: columns are exchanged for heads before attention, and back after it.

    tensor            outside             in attention
    batch, hidden X   X[B, S_cp, D]       -
    queries Q         Q[B, S_cp, H, E]    Q[B, S, H_cp, E]
    keys, values K    K[B, S_cp, G, E]    K[B, S, G_cp, E]
    parameter W       W[D, F]             -
    gradient  G       G[D, F]{U_cp}       -

`X[B, S_cp, D]` reads: columns cut over cp, in one run a rank; `{U_cp}`: not yet summed over cp, which the data strategy
does, over dp x cp at once.

Bytes sent by a rank of n in one layer and one step: (n-1)/n (2 Q + K) to all_to_all forward, and the same backward (Q:
its queries, or what comes out, K: its keys and values together); and where n does not divide the key/value heads, as
many in both together. Where there are experts, what a row counts of them is summed over cp: 2 (n-1)/n B E numbers to
all_reduce. Memory: nothing between steps.

n must divide the columns, and there must be a key/value head for each rank, of those that its rank of tp has. Where n
does not divide these, the first ranks have one more, with the queries that belong to it.

Source: DeepSpeed 0.19.8; Jacobs et al., "DeepSpeed Ulysses", 2023.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.blockwise import Share
from sandbox.comm import all_reduce, ring_bytes
from sandbox.config import Config, that_do
from sandbox.config import Options as Base
from sandbox.engines.deepspeed import _engine
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.model import Attention, MoE, mixtures
from sandbox.model.attention import Core
from sandbox.partition import even
from sandbox.predict import Prediction
from sandbox.program import Program

AXIS = "cp"
REFUSES = _engine.REFUSES


class Options(Base):
    """Options of `context`: none."""


def check(config: Config, options: Options) -> None:
    """Raises UnsupportedError: columns that the degree does not divide, or fewer key/value heads than ranks."""
    degree, columns, tp = config.mesh.cp.degree, config.data.sequence, config.mesh.tp.degree
    least = config.model.groups // tp
    fit = that_do([n for n in range(1, least + 1) if columns % n == 0], "Degrees")
    if columns % degree:
        raise UnsupportedError(
            f"mesh.cp.degree {degree} does not divide data.sequence {columns}, and DeepSpeed's Ulysses deals out "
            f"columns in equal parts only. {fit}"
        )
    if least < degree:
        held = f"model.kv_heads {least}" if tp == 1 else f"the key/value heads of a rank of tp, {least}"
        raise UnsupportedError(
            f"mesh.cp.degree {degree} is more than {held}: DeepSpeed's Ulysses gives each rank one. {fit}"
        )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with its columns cut over cp, and attention by DeepSpeed's DistributedAttention."""
    _engine.prepare()
    from deepspeed.sequence import layer
    from deepspeed.sequence.layer import DistributedAttention

    axis = mesh.axis("cp")
    # where heads do not divide: its own groups, which there are none of, would tell every rank that it is the first
    layer.groups = SimpleNamespace(_get_sequence_parallel_rank=lambda: axis.rank)

    def local(inner: Core, batch: Batch) -> Core:
        def attend(q: Tensor, k: Tensor, v: Tensor, _: object = None) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return inner(q, k, v, batch).transpose(1, 2).contiguous()

        return attend

    def core(inner: Core) -> Core:
        def attend(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
            assert isinstance(batch, Share)
            ulysses = DistributedAttention(local(inner, batch.whole), axis.group, scatter_idx=2, gather_idx=1)
            q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            out: Tensor = ulysses(q, k, v, batch_dim_idx=0)
            return out.transpose(1, 2)

        return attend

    def over_columns(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda counts: all_reduce(inner(counts), axis).wait()

    for module in program.model.modules():
        if isinstance(module, Attention):
            module.core = core(module.core)
    for moe in mixtures(program.model):
        moe.across = over_columns(moe.across)

    def shard_batch(batch: Batch) -> Batch:
        whole = program.shard_batch(batch)
        return Share.of(whole, list(torch.arange(len(whole.columns)).chunk(axis.size)), axis.rank)

    return replace(program, shard_batch=shard_batch)


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes that this rank sends in one step. It holds nothing of its own between steps."""
    axis, train, sizes = mesh.axis("cp"), config.train, config.model
    rows = even(train.batch, mesh.data.size)[mesh.data.rank]
    head = sizes.width // sizes.heads * config.data.sequence // axis.size * (2 if train.dtype == "bfloat16" else 4)
    sent = 0
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        groups = attention.k.weight.shape[0] * sizes.heads // sizes.width  # of this rank of tp
        own = even(groups, axis.size)[axis.rank]
        queries = sizes.heads // sizes.groups
        away, back = groups - own, own * (axis.size - 1)  # heads of others, sent to them; own heads, columns of others
        forward, backward = (queries + 2) * away + queries * back, (queries + 2) * back + queries * away
        sent += forward * (1 if train.recompute == "none" else 2) + backward
    counts = sum(4 * rows * sizes.experts for module in model.modules() if isinstance(module, MoE))
    counted = (2 if train.recompute == "full" else 1) * ring_bytes(counts, axis.size)
    return Prediction({f"all_to_all {axis.name}": sent * rows * head, f"all_reduce {axis.name}": counted})
