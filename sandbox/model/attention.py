"""Causal self-attention over packed documents, with rotary positions and grouped heads.

Sources: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; Su et al., "RoFormer", 2021 (rotary positions, here
with features i and i + E/2 as a pair); Ainslie et al., "GQA", EMNLP 2023 (grouped heads); Henry et al., "Query-Key
Normalization", 2020.

Shapes: B rows, S columns, D width, H query heads, G key/value heads, E = D / H width of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sandbox.batch import Batch, once_per_batch
from sandbox.config import Model
from sandbox.model.layers import Linear, Linears, each, norm, wide

__all__ = ["Attention", "Core", "attend", "triangular", "visible"]

Core = Callable[[Tensor, Tensor, Tensor, Batch], Tensor]
"""`core(q, k, v, batch)`: q [B, H, S, E], k and v [B, G, S, E] -> [B, H, S, E]."""


class Attention(nn.Module):
    """Projections around `core`, the attention proper, which context parallelism replaces, as tensor parallelism does
    with `linears`, those of the projections that share the input.

    The number of heads is read off the projections' outputs, so that tensor parallelism may cut the projections.
    """

    def __init__(self, config: Model, dtype: torch.dtype) -> None:
        super().__init__()
        width, bias = config.width, config.bias
        self.rotary = config.rotary
        self.head_width = width // config.heads
        self.q = Linear(width, config.heads * self.head_width, bias, dtype=dtype)
        self.k = Linear(width, config.groups * self.head_width, bias, dtype=dtype)
        self.v = Linear(width, config.groups * self.head_width, bias, dtype=dtype)
        self.o = Linear(config.heads * self.head_width, width, bias, dtype=dtype)
        self.q_norm = norm(config, self.head_width, dtype) if config.qk_norm else nn.Identity()
        self.k_norm = norm(config, self.head_width, dtype) if config.qk_norm else nn.Identity()
        self.linears: Linears = each
        self.core: Core = attend

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        projected = self.linears(x, self.q, self.k, self.v)
        q, k, v = (y.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for y in projected)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            cos, sin = _angles(batch, self.head_width, wide(x.dtype))
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out: Tensor = self.o(self.core(q, k, v, batch).transpose(1, 2).flatten(2))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Softmax attention of each token to those it may see: [B, H, S, E], 2 x [B, G, S, E] -> [B, H, S, E]."""
    mask = _mask(batch)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )


def visible(queries: Batch, keys: Batch) -> Tensor:
    """Which keys a query may see, [B, 1, Sq, Sk] bool: those of its document that do not come later.

    Padding sees padding, hence at least itself: a row of the softmax is never empty.
    """
    same = queries.documents[:, :, None] == keys.documents[:, None, :]
    earlier = keys.positions[:, None, :] <= queries.positions[:, :, None]
    return (same & earlier)[:, None]


def triangular(batch: Batch) -> bool:
    """Whether that is a plain triangle among the batch's own tokens: one document in a row, in order."""
    one_document = (batch.documents == batch.documents[:, :1]).all()
    return bool(one_document & (batch.positions.diff(dim=1) > 0).all())


@once_per_batch
def _mask(batch: Batch) -> Tensor | None:
    """`visible` among the batch's own tokens, or None where that is a plain triangle, which kernels do faster."""
    return None if triangular(batch) else visible(batch, batch)


@once_per_batch
def _angles(batch: Batch, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, [B, 1, S, width / 2]; float64 until the end, for long contexts."""
    pairs = torch.arange(0, width, 2, dtype=torch.float64, device=batch.positions.device)
    angles = batch.positions[:, None, :, None] * 10_000 ** (-pairs / width)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
