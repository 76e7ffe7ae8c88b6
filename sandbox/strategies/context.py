"""Context parallelism: every rank holds some of the columns, and attention alone reaches beyond them.

    tensor            outside             ring: in use          gather: in use        ulysses: in use
    batch, hidden X   X[B, S_cp, D]       -                     -                     -
    queries Q         Q[B, H, S_cp, E]    Q[B, H, S_cp, E]      Q[B, H, S_cp, E]      Q[B, H_cp, S, E]
    keys, values K    K[B, G, S_cp, E]    + one block           K[B, G, S, E]         K[B, G_cp, S, E]
    their gradients   K[B, G, S_cp, E]    + one block, {U_cp}   K[B, G, S, E]{U_cp}   K[B, G_cp, S, E]
    parameter W       W[D, F]             -                     -                     -
    gradient  G       G[D, F]{U_cp}       -                     -                     -

`X[B, S_cp, D]` reads: columns cut over cp; `{U_cp}`: not yet summed over cp; H query heads and G key/value heads of
width E. Parameters are replicated over cp and their gradients are partial sums, which the data strategy sums over
dp x cp at once: nothing is left to reduce here.

Bytes sent by a rank of n in one layer and one step (Q: its queries, K: its keys and values together):

    ring       send           (n-1) K forward; backward (n-1) K again, and (n-1) K of gradients
    gather     all_gather     (n-1) K forward; backward reduce_scatter (n-1) K
    ulysses    all_to_all     (n-1)/n (Q + K) and (n-1)/n Q forward, and the same backward
    experts    all_reduce     2 (n-1)/n of a count for each row and expert, forward: the tokens that chose it

With `train.recompute` all of forward is sent once more. A ring holds one block of others at a time and gathers nothing,
whatever the length of the sequence. In bfloat16 its gradients of keys travel as float32. Ulysses needs a number of
heads that the ranks divide; if there are fewer key/value heads, each goes to every rank whose queries need it, and
counts each time. Memory: nothing between steps.

`order: zigzag` cuts the sequence into 2n chunks, and rank r holds chunks r and 2n-1-r: one early, with few keys to look
back on, and one late, so that all ranks compute the same; `contiguous` leaves most to the last rank. Numbers of columns
differ by one at most. Positions and documents are explicit, so any order and any mask is right (blockwise.py), and a
block that none of a rank's queries may see is passed on unread.

Sources: Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023; Brandon et al.,
"Striped Attention", 2023 (balance); Dubey et al., "The Llama 3 Herd of Models", 2024, 3.3.2 (gather, zigzag); Jacobs et
al., "DeepSpeed Ulysses", 2023.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.blockwise import Share
from sandbox.comm import Axis, all_reduce, all_to_all, ring_bytes
from sandbox.config import Config, that_do
from sandbox.config import Options as Base
from sandbox.errors import ConfigError
from sandbox.mesh import Mesh
from sandbox.model import Attention, MoE, mixtures
from sandbox.model.attention import Core
from sandbox.partition import even
from sandbox.predict import Prediction
from sandbox.program import Program
from sandbox.ring import Gather, Ring

AXIS = "cp"


class Options(Base):
    """Options of `context`."""

    kind: Literal["ring", "gather", "ulysses"] = Field("ring", description="how queries and keys of two ranks meet")
    order: Literal["zigzag", "contiguous"] = Field("zigzag", description="which columns a rank holds")


def check(config: Config, options: Options) -> None:
    """Refuse a sequence that leaves a rank without a column, and heads that ranks cannot share."""
    degree, sequence, heads, tp = config.mesh.cp.degree, config.data.sequence, config.model.heads, config.mesh.tp
    each = tp.degree if tp.options.get("sequence") else 1
    fit = list(range(1, sequence // each + 1))
    if by_heads := options.kind == "ulysses" and tp.degree == 1:  # of a rank of tp: tensor.py looks
        fit = [n for n in fit[:heads] if heads % n == 0]
    if sequence < degree:
        raise ConfigError(
            f"data.sequence {sequence} leaves a rank without a column: mesh.cp.degree is {degree}. "
            f"Set data.sequence: {degree * each}{f', or mesh.cp.degree: {fit[-1]}' if fit else ''}."
        )
    if by_heads and degree not in fit:
        raise ConfigError(
            f"mesh.cp.degree {degree} does not divide model.heads {heads}, as mesh.cp.kind ulysses needs. "
            f"{that_do(fit, 'Degrees')} Or set mesh.cp.kind: ring or gather."
        )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with its columns cut over cp, and attention that reaches all of them."""
    axis = mesh.axis(AXIS)
    for module in program.model.modules():
        if isinstance(module, Attention):
            module.core = {
                "ring": partial(blockwise, Ring, axis),
                "gather": partial(blockwise, Gather, axis),
                "ulysses": partial(ulysses, module.core, axis),
            }[options.kind]
    for moe in mixtures(program.model):
        moe.across = partial(over_columns, moe.across, axis)

    def shard_batch(batch: Batch) -> Batch:
        whole = program.shard_batch(batch)
        return Share.of(whole, columns(len(whole.columns), axis.size, options.order), axis.rank)

    return replace(program, shard_batch=shard_batch)


def over_columns(inner: Callable[[Tensor], Tensor], axis: Axis, counts: Tensor) -> Tensor:
    """What is counted in the rows of this rank's columns, [B, experts], over all columns."""
    return all_reduce(inner(counts), axis).wait()


def columns(sequence: int, ranks: int, order: str) -> list[Tensor]:
    """The columns of each rank, [S_cp] each; their numbers differ by one at most."""
    if order == "contiguous":
        return list(torch.arange(sequence).tensor_split(ranks))
    chunks = torch.arange(sequence).tensor_split(2 * ranks)
    return [torch.cat((chunks[rank], chunks[-1 - rank])) for rank in range(ranks)]


def held(mesh: Mesh, config: Config) -> int:
    """How many columns this rank holds."""
    axis, options = mesh.axis(AXIS), Options.model_validate(config.mesh.cp.options)
    return len(columns(config.data.sequence, axis.size, options.order)[axis.rank])


def blockwise(how: type[Ring | Gather], axis: Axis, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Attention to all ranks' columns, block by block: [B, H, S_cp, E] and twice [B, G, S_cp, E] -> [B, H, S_cp, E]."""
    out: Tensor = how.apply(q, torch.stack((k, v)), batch, axis)  # type: ignore[no-untyped-call]
    return out


def ulysses(inner: Core, axis: Axis, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Exchange columns for heads, attend to all columns with the heads that came, and exchange back.

    [B, H, S_cp, E] and twice [B, G, S_cp, E] -> [B, H, S_cp, E]; in between [B, H_cp, S, E] and [B, G_cp, S, E].
    """
    assert isinstance(batch, Share)
    heads, ratio, owners = q.shape[1] // axis.size, q.shape[1] // k.shape[1], range(axis.size)
    spans = head_spans(q.shape[1], k.shape[1], axis.size)
    own = spans[axis.rank].stop - spans[axis.rank].start
    sizes = [len(held) for held in batch.columns_of]
    parts = [torch.cat((q.split(heads, 1)[rank], k[:, spans[rank]], v[:, spans[rank]]), 1) for rank in owners]
    came = exchange(axis, [(len(q), heads + 2 * own, size, q.shape[-1]) for size in sizes], parts)
    together = torch.cat([came[rank][:, :, run] for rank, run in batch.pieces], dim=2)
    q, k, v = together.split([heads, own, own], dim=1)
    if heads % ratio and ratio % heads:  # a key's queries are some here and some elsewhere, not as many for each
        group = (torch.arange(heads) + axis.rank * heads) // ratio - spans[axis.rank].start
        k, v = k[:, group], v[:, group]
    runs = inner(q, k, v, batch.whole).split([run.stop - run.start for _, run in batch.pieces], dim=2)
    back = [
        torch.cat([run for run, (rank, _) in zip(runs, batch.pieces, strict=True) if rank == to], 2) for to in owners
    ]
    return torch.cat(exchange(axis, [(len(q), heads, sizes[axis.rank], q.shape[-1])] * axis.size, back), dim=1)


def head_spans(heads: int, groups: int, ranks: int) -> list[slice]:
    """The key/value heads that each rank's query heads need; neighbours may need the same one."""
    each, ratio = heads // ranks, heads // groups
    return [slice(rank * each // ratio, ((rank + 1) * each - 1) // ratio + 1) for rank in range(ranks)]


def exchange(axis: Axis, shapes: Sequence[tuple[int, ...]], parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Give every rank its part, and get one of the given shape from each."""
    came: tuple[Tensor, ...] = Exchange.apply(axis, shapes, *parts)  # type: ignore[no-untyped-call]
    return came


class Exchange(torch.autograd.Function):
    """`exchange`, and its way back: gradients go to where the parts came from."""

    @staticmethod
    def forward(ctx: Any, axis: Axis, shapes: Sequence[tuple[int, ...]], *parts: Tensor) -> Any:
        """Parts for all ranks, in rank order -> parts from all ranks."""
        ctx.axis, ctx.shapes = axis, [part.shape for part in parts]
        return _swap(parts, shapes, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of what came -> gradients of what went."""
        return None, None, *_swap(grads, ctx.shapes, ctx.axis)


def _swap(parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], axis: Axis) -> tuple[Tensor, ...]:
    sizes, landing_sizes = [part.numel() for part in parts], [math.prod(shape) for shape in shapes]
    flat = torch.cat([part.flatten() for part in parts])
    landed = all_to_all(flat, sizes, flat.new_empty(sum(landing_sizes)), landing_sizes, axis).wait()
    return tuple(part.view(shape) for part, shape in zip(landed.split(landing_sizes), shapes, strict=True))


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes that this rank sends in one step. It holds nothing of its own between steps."""
    axis, train = mesh.axis(AXIS), config.train
    again = train.recompute != "none"
    width = [len(part) for part in columns(config.data.sequence, axis.size, options.order)]
    own, others = width[axis.rank], config.data.sequence - width[axis.rank]
    rows = even(train.batch, mesh.data.size)[mesh.data.rank]
    item, sums = {"float64": (8, 8), "float32": (4, 4), "bfloat16": (2, 4)}[train.dtype]
    traffic: dict[str, float] = defaultdict(float)
    for module in model.modules():
        if isinstance(module, MoE):
            counts = rows * config.model.experts * (8 if item == 8 else 4)
            counted = 2 if train.recompute == "full" else 1
            traffic[f"all_reduce {axis.name}"] += counted * ring_bytes(counts, axis.size)
        if not isinstance(module, Attention):
            continue
        column = rows * module.head_width  # elements of one head in a column, in all rows
        heads, groups = (part.weight.shape[0] // module.head_width for part in (module.q, module.k))
        if options.kind == "ring":  # the last block to come is not passed on; of gradients, one's own are not
            passed = (2 + again) * (config.data.sequence - width[(axis.rank + 1) % axis.size])
            traffic[f"send {axis.name}"] += 2 * groups * column * (passed * item + others * sums)
        elif options.kind == "gather":
            traffic[f"all_gather {axis.name}"] += (1 + again) * 2 * groups * column * (axis.size - 1) * own * item
            traffic[f"reduce_scatter {axis.name}"] += 2 * groups * column * others * item
        else:
            each = heads // axis.size
            came = [each + 2 * (span.stop - span.start) for span in head_spans(heads, groups, axis.size)]
            forward = own * (sum(came) - came[axis.rank]) + others * each  # its columns; results of its heads
            backward = own * each * (axis.size - 1) + others * came[axis.rank]
            traffic[f"all_to_all {axis.name}"] += column * ((1 + again) * forward + backward) * item
    return Prediction(traffic)
