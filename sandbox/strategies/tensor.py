"""Tensor parallelism: every matrix is cut, so that a block needs one sum over the ranks for each of its two halves.

    tensor                       before         in use
    q, k, v, gate, up W, b       W[F_tp, D]     its own heads or hidden features, of a whole input; in experts too
    o, down           W          W[D, F_tp]     from its own heads or features, a term of the sum
    o, down           b          b[D]           added once, after the sum
    embedding, head   W          W[V_tp, D]     its own words
    norm1, norm2, norm           w[D]           whole, on whole columns; with `sequence`, on its own ones: {U_tp}
    router            W          W[experts, D]  whole, on whole columns
    q_norm, k_norm               w[E]           on its own heads of width E: gradient {U_tp}, then summed
    hidden state      X          X[B, S, D]     with `sequence`, X[B, S_tp, D] outside attention, MLP and head
    logits            Y          Y[B, S, V_tp]  never gathered

`W[F_tp, D]` reads: F is cut over axis tp; `{U_tp}`: not yet summed over tp. Heads, features, words and columns need not
divide: ranks differ by one at most (of heads, by one group). With fewer key/value heads than ranks, ranks are dealt out
to them: several hold the same k and v, each with queries of its own, and sum the gradients among themselves.

Bytes sent by a rank for each microbatch: n ranks, L blocks, X bytes of hidden state [B, S, D], w of shared weights.

    all_reduce       2 (n-1)/n X (4 L + 2)    twice a block in forward and in backward; embedding, input of the head
    all_gather       2 (n-1) B S numbers      the loss: from each rank, log-sum-exp and the target's logit
    all_reduce       2 (n-1)/n w              gradients of shared weights, one sum a block

Of a mixture of experts each expert is cut like an MLP, and their sum over ranks is taken once, of the weighted results.
So of the gate weights' gradient each rank has a term: all_reduce 2 (n-1)/n of B S top_k numbers. The router sees whole
columns on every rank; with `sequence` what it and the experts see is gathered once, and kept.

With `sequence: true` (Megatron's sequence parallelism) what lies between attention, MLP and head is cut by columns.
Each all_reduce of X becomes a reduce_scatter and an all_gather, (n-1)/n X each; and the input of q, k, v, of gate, up
and of the head is gathered again in backward instead of kept, (n-1)/n X (2 L + 1). Norms, dropout and what backward
keeps of them shrink by n; gradients of norms and of the biases of o and down are sums over tp too. With `full`
recomputation a block's forward collectives run again, but for the last sum unless dropout follows; with `selective`,
the gather for q, k, v. Memory: all is cut by n, but norms, biases of o and down, and k and v held by several ranks. The
sum of an input's gradient travels while the weights' gradients are computed.

The loss, from local l = log sum exp(y) and the target's logit t (0 where another rank has the word), is
log sum_tp exp(l) - sum_tp t: one exchange of two numbers a token. Its backward, softmax - onehot, is local.

Sources: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019;
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", MLSys 2023.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from pydantic import Field
from torch import nn

from sandbox.comm import Axis, ring_bytes
from sandbox.config import Config, Model, that_do
from sandbox.config import Options as Base
from sandbox.errors import ConfigError
from sandbox.mesh import Mesh
from sandbox.model import Block, MoE, Transformer, mixtures
from sandbox.model.attention import Attention
from sandbox.model.dropout import Dropout
from sandbox.model.layers import MLP
from sandbox.partition import own
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, replace_parameters
from sandbox.regions import Border, Weights, share, share_weights, vocabulary_loss
from sandbox.row_parallel import add_once, look_up_own, sum_rows
from sandbox.strategies import context

__all__ = ["AXIS", "Options", "apply", "check", "halves", "predict"]

AXIS = "tp"


class Options(Base):
    """Options of `tensor`."""

    sequence: bool = Field(False, description="cut norms and dropout by columns (Megatron's sequence parallelism)")


@dataclass(frozen=True)
class Heads:
    """Heads of a rank. Queries stay with their key/value head; `holders` are the ranks that hold the same one."""

    queries: range
    keys: range
    holders: range

    @classmethod
    def of(cls, model: Model, axis: Axis) -> "Heads":
        """Whole groups of heads; or if there are too few, some queries of one group."""
        groups, ratio = model.groups, model.heads // model.groups
        if groups >= axis.size:
            keys = own(groups, axis.size, axis.rank)
            return cls(times(keys, ratio), keys, range(axis.rank, axis.rank + 1))
        crowds = (own(axis.size, groups, head) for head in range(groups))
        head, crowd = next((head, crowd) for head, crowd in enumerate(crowds) if axis.rank in crowd)
        queries = own(ratio, len(crowd), axis.rank - crowd.start)
        return cls(range(queries.start + head * ratio, queries.stop + head * ratio), range(head, head + 1), crowd)


def times(part: range, width: int) -> range:
    """From heads to their features."""
    return range(part.start * width, part.stop * width)


def check(config: Config, options: Options) -> None:
    """Every rank needs something of everything that is cut."""
    degree, cp, model, kind = config.mesh.tp.degree, config.mesh.cp, config.model, config.mesh.cp.options.get("kind")
    least = {"model.heads": model.heads, "model.hidden": model.mlp_hidden, "model.vocab": model.padded_vocab}
    if options.sequence and config.data.sequence >= cp.degree:  # or context.py refuses it
        least["data.sequence / mesh.cp.degree"] = config.data.sequence // cp.degree
    name, size = min(least.items(), key=lambda item: item[1])
    fit = [n for n in range(1, size + 1) if kind != "ulysses" or math.gcd(*heads(model, n)) % cp.degree == 0]
    if degree > size:
        raise ConfigError(f"mesh.tp.degree {degree} is more than {name} {size}. {that_do(fit or [1], 'Degrees')}")
    if degree not in fit:
        dealt = heads(model, degree)
        others = [n for n in range(2, max(dealt) + 1) if math.gcd(*dealt) % n == 0]
        named = [f", or mesh.{a}.degree: {' or '.join(map(str, do))}" for a, do in (("cp", others), ("tp", fit)) if do]
        raise ConfigError(
            f"mesh.cp.degree {cp.degree} does not divide the heads of each rank of tp, as mesh.cp.kind ulysses needs: "
            f"of model.heads {model.heads} ranks have {str(dealt)[1:-1]}. Set mesh.cp.kind: ring{''.join(named)}."
        )


def heads(model: Model, degree: int) -> list[int]:
    """How many query heads each rank of tp has."""
    return [len(Heads.of(model, Axis((AXIS,), degree, rank)).queries) for rank in range(degree)]


def cut(model: nn.Module, config: Model, axis: Axis) -> dict[str, tuple[int, range]]:
    """Cut the parameters of a model on the meta device -> name: the dimension that is cut, and what is left of it."""
    mine, width = Heads.of(config, axis), config.width // config.heads
    queries, keys = times(mine.queries, width), times(mine.keys, width)
    hidden = own(config.mlp_hidden, axis.size, axis.rank)
    words = own(config.padded_vocab, axis.size, axis.rank)
    left = {"q": queries, "k": keys, "v": keys, "gate": hidden, "up": hidden, "embed": words, "head": words}
    rows = {"o.weight": queries, "down.weight": hidden}
    cuts: dict[str, tuple[int, range]] = {}
    new: dict[str, nn.Parameter] = {}
    for name, param in model.named_parameters():
        *_, layer, kind = name.split(".")
        if layer in left:
            cuts[name] = (0, left[layer])
        elif f"{layer}.{kind}" in rows:
            cuts[name] = (1, rows[f"{layer}.{kind}"])
        else:
            continue
        dim, part = cuts[name]
        new[name] = nn.Parameter(param.detach().narrow(dim, part.start, len(part)).clone())
    replace_parameters(model, new)
    return cuts


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with its matrices cut over tp, and the loss of a cut vocabulary."""
    axis, config, model = mesh.axis(AXIS), program.config.model, cast(Transformer, program.model)
    holding, words = Heads.of(config, axis).holders, own(config.padded_vocab, axis.size, axis.rank)
    holders = mesh.part(AXIS, holding.start, holding.stop)
    layout = dict(program.layout)
    for name, (dim, part) in cut(model, config, axis).items():
        copy = holders.rank if name.split(".")[-2] in ("k", "v") else 0
        piece = layout[name].cut(dim, part.start, part.stop, axis.names)
        layout[name] = replace(piece, copy=copy or piece.copy)
    border = Border(axis, options.sequence)
    model.register_forward_pre_hook(border.see)
    if model.embed is not None:
        look_up_own(model.embed, words, model.dtype, border)
    for block in cast("list[Block]", list(model.blocks.values())):
        for region, last in halves(block):
            region.linears = border.linears
            sum_rows(last, border)
    for moe in mixtures(model):
        moe.enter, moe.weigh, moe.leave = border.enter, lambda weights: share(axis, weights)[0], border.leave
        for expert in moe.experts.values():
            add_once(cast(MLP, expert).down, axis)
    if (head := model.head) is not None:
        head.forward = lambda x: border.linears(x, head)[0]  # type: ignore[method-assign]
    for within, weights, over in shared(model, options, axis, holders):
        share_weights(within, weights, over)
    if options.sequence:
        for module in model.modules():
            if isinstance(module, Dropout):
                module.register_forward_pre_hook(border.stay)
    return replace(
        program,
        parameters=dict(model.named_parameters()),
        layout=layout,
        loss=lambda logits, targets: vocabulary_loss(logits, targets, words, axis),
    )


def shared(
    model: Transformer, options: Options, axis: Axis, holders: Axis
) -> Iterator[tuple[nn.Module, Weights, Axis]]:
    """Parameters that several ranks hold and use on parts: inside which module, which ones, over which ranks."""

    def all_of(*layers: nn.Module) -> Weights:
        return [(layer, name) for layer in layers for name, _ in layer.named_parameters(recurse=False)]

    for block in cast("list[Block]", list(model.blocks.values())):
        attention = block.attention
        weights = all_of(attention.q_norm, attention.k_norm)
        if options.sequence:
            biased = [layer for _, layer in halves(block) if layer.bias is not None]
            weights += [*all_of(block.norm1, block.norm2), *((layer, "bias") for layer in biased)]
        yield block, weights, axis
        yield block, all_of(attention.k, attention.v), holders
    if model.norm is not None and options.sequence:
        yield model.norm, all_of(model.norm), axis


def halves(block: Block) -> list[tuple[Attention | MLP, nn.Linear]]:
    """What is entered by linears that share an input, and left by the sum of one linear's outputs: no mixture is."""
    attention = (block.attention, block.attention.o)
    return [attention] if isinstance(block.mlp, MoE) else [attention, (block.mlp, block.mlp.down)]


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    axis, model = mesh.axis(AXIS), cast(Transformer, model)
    cut(model, config.model, axis)
    alike = Heads.of(config.model, axis).holders
    parts = list(shared(model, options, axis, mesh.part(AXIS, alike.start, alike.stop)))
    first = mesh.axis("pp").rank == 0  # a tied head keeps the embedding on a stage that does not run it
    last, blocks, again = model.head is not None, len(model.blocks), config.train.recompute
    mixed = len(list(mixtures(model)))
    mine = len(own(columns := context.held(mesh, config), axis.size, axis.rank))
    batch = len(own(config.train.batch, mesh.data.size, mesh.data.rank))
    width = config.model.width * model.dtype.itemsize
    wide = torch.promote_types(model.dtype, torch.float32).itemsize
    regions, ends = {"none": (0, 0), "selective": (1, 0), "full": (2, 2 if config.model.dropout else 1)}[again]
    gathers = (6 + regions) * blocks - mixed + first + 2 * last
    sums = (4 + ends) * blocks + first + last
    traffic: dict[str, float] = defaultdict(float)
    for number in range(config.train.microbatches):
        rows = len(own(batch, config.train.microbatches, number))
        if options.sequence:
            traffic[f"all_gather {AXIS}"] += gathers * (axis.size - 1) * rows * mine * width
            traffic[f"reduce_scatter {AXIS}"] += sums * rows * (columns - mine) * width
        else:
            traffic[f"all_reduce {AXIS}"] += sums * ring_bytes(rows * columns * width, axis.size)
        traffic[f"all_reduce {AXIS}"] += mixed * ring_bytes(rows * columns * config.model.top_k * wide, axis.size)
        traffic[f"all_gather {AXIS}"] += last * (axis.size - 1) * 2 * rows * columns * wide
        for _, weights, over in parts:
            size = bytes_of(layer.get_parameter(name) for layer, name in weights)
            traffic[f"all_reduce {AXIS}"] += ring_bytes(size, over.size)
    held = bytes_of(model.parameters())
    memory = {"parameters": held, "gradients": held, "optimizer": state_copies(config.train) * held}
    return Prediction(traffic, memory)
