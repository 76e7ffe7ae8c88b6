"""Layers of which each rank has some input features or words, so that its output is a term of a sum over the ranks.

Source: Shoeybi et al., "Megatron-LM", 2019 (row-parallel linears, vocabulary-parallel embedding).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sandbox.comm import Axis, ring_bytes
from sandbox.config import Config
from sandbox.mesh import Mesh
from sandbox.partition import even
from sandbox.regions import Border

__all__ = ["add_once", "bytes_of_sums", "look_up_own", "sum_rows"]


def sum_rows(linear: nn.Linear, border: Border) -> None:
    """Make a linear, whose input features are cut, sum over the ranks; its bias is added after that, once."""

    def forward(x: Tensor) -> Tensor:
        out = border.leave(F.linear(x, linear.weight.to(x.dtype)))
        return out if linear.bias is None else out + linear.bias.to(x.dtype)

    linear.forward = forward  # type: ignore[method-assign, assignment]


def add_once(linear: nn.Linear, axis: Axis) -> None:
    """Make a linear, whose output is summed later, add its bias on one rank; on others zero, with the same gradient."""

    def forward(x: Tensor) -> Tensor:
        bias: Tensor | None = linear.bias
        if bias is not None:
            bias = (bias if axis.rank == 0 else bias - bias.detach()).to(x.dtype)
        return F.linear(x, linear.weight.to(x.dtype), bias)

    linear.forward = forward  # type: ignore[method-assign, assignment]


def look_up_own(embed: nn.Embedding, words: range, dtype: torch.dtype, border: Border) -> None:
    """Make an embedding look up the words that it has. Others give zero: one rank's term is the sum, in any `dtype`."""

    def forward(tokens: Tensor) -> Tensor:
        elsewhere = (tokens < words.start) | (tokens >= words.stop)
        rows = F.embedding((tokens - words.start).masked_fill(elsewhere, 0), embed.weight)
        return border.leave(rows.to(dtype).masked_fill(elsewhere[..., None], 0.0))

    embed.forward = forward  # type: ignore[method-assign, assignment]


def bytes_of_sums(linears: Iterable[str], item: int, mesh: Mesh, config: Config) -> float:
    """Bytes that a rank sends over tp in one step to sum hidden states [B, S, D], of `item` bytes each number.

    For each of `linears` once in a pass; those of a layer's experts see `top_k` such states together. With full
    recomputation o's sum is taken once more, and down's where dropout needs it, or the weights of experts.
    """
    model, train = config.model, config.train
    experts = [".experts." in name for name in linears]
    sums = experts.count(False) + experts.count(True) * model.top_k // max(1, model.experts)
    if train.recompute == "full":
        ends = [model.top_k if model.has_experts(layer) else int(model.dropout > 0) for layer in range(model.layers)]
        sums += model.layers + sum(ends)
    own = even(train.batch, mesh.data.size)[mesh.data.rank]
    row = config.data.sequence // mesh.axis("cp").size * model.width * item
    return sums * sum(ring_bytes(rows * row, mesh.axis("tp").size) for rows in even(own, train.microbatches))
