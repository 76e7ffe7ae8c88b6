"""Attention to keys that arrive block by block: exact, in whatever order they come, and without all scores at once.

Attention to one block gives each query a result o and the log-sum-exp l of its scores. With those so far, O and L,

    L' = log(e^L + e^l)        O' = e^(L - L') O + e^(l - L') o

and after the last block O is the result. Backward needs L alone to have any block's probabilities again,
p = e^(s - L), and with D = sum(out dout) of each query

    dv = p^T dout        ds = p (dout v^T - D)        dq = ds k        dk = ds^T q

so each block's dk and dv are finished by itself and can travel on. Sums are at least float32.

A block is worked on in rectangles of queries and keys: as large as can be where all is seen, or what is seen is a plain
triangle; where documents meet they are cut until they are no larger than TILE, and then have a mask. Those that no
query may look into are left out, so what is computed follows from what may be seen alone: causal, packed or padded. On
a CPU each is a call of torch's fused kernel, elsewhere the formulas as they stand, in tiles (no GPU has run them yet).

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention",
NeurIPS 2022; Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023.

Shapes: B rows, H heads, G key/value heads, S columns, E width of a head; Q and K columns of a tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product
from typing import Self

import torch
from torch import Tensor

from sandbox.batch import Batch
from sandbox.model import triangular, visible
from sandbox.model.layers import wide

__all__ = ["TILE", "Backward", "Forward", "Share", "Tile"]

TILE = 256
"""Columns of a tile that has a mask, or is computed without a fused kernel: its scores fit the cache."""


@dataclass(frozen=True)
class Tile:
    """Some of the queries against some keys of a block. `hidden` [B, 1, Q, K] is None if all see all.

    Of a `triangle` [Q, Q] the upper half is hidden.
    """

    queries: slice
    keys: slice
    hidden: Tensor | None = None
    triangle: bool = False


@dataclass(frozen=True, eq=False)
class Share(Batch):
    """One rank's columns of a batch. It remembers whose the others are, for its queries attend to their keys."""

    whole: Batch  # the same rows, all columns
    columns_of: Sequence[Tensor]  # rank -> the columns that it holds
    rank: int

    @classmethod
    def of(cls, whole: Batch, columns_of: Sequence[Tensor], rank: int) -> Self:
        """The columns of `rank`."""
        fields = vars(whole.take_columns(columns_of[rank]))
        return cls(**fields, whole=whole, columns_of=columns_of, rank=rank)

    def take_rows(self, index: Tensor | slice) -> Self:
        """The given rows of the share, and of what it remembers."""
        return replace(super().take_rows(index), whole=self.whole.take_rows(index))

    def to(self, device: torch.device) -> Self:
        """The same share on `device`."""
        return replace(super().to(device), whole=self.whole.to(device))

    @cached_property
    def pieces(self) -> list[tuple[int, slice]]:
        """All runs of columns in the order of the sequence: the rank that holds it, and where among its columns."""
        runs = [(rank, run) for rank, columns in enumerate(self.columns_of) for run in _runs(columns)]
        return sorted(runs, key=lambda run: int(self.columns_of[run[0]][run[1].start]))

    @cached_property
    def tiles(self) -> list[list[Tile]]:
        """By rank: which tiles of its keys this rank's queries look into.

        Of the rank's own block those on the diagonal come first: every token sees itself, so each query meets a score
        that is finite before any tile that hides all keys from it.
        """
        others = [self.whole.take_columns(columns) for columns in self.columns_of]
        own, size = others[self.rank], len(self.columns)
        return [
            sorted(_tiles(own, other, slice(0, size), slice(0, len(other.columns))), key=lambda t: t.queries != t.keys)
            for other in others
        ]


def _tiles(queries: Batch, keys: Batch, rows: slice, columns: slice) -> Iterator[Tile]:
    """Those of a rectangle of scores. It is cut in four while it is large, and some of it is seen and some is not."""
    mine, theirs = queries.take_columns(rows), keys.take_columns(columns)
    seen = told(mine, theirs)
    if seen is False:
        return
    large = max(len(mine.columns), len(theirs.columns)) > TILE
    fits = fused(mine.documents) or not large
    if seen and fits:
        yield Tile(rows, columns)
    elif fits and queries is keys and rows == columns and triangular(mine):
        yield Tile(rows, columns, triangle=True)
    elif large:
        for quarter in product(_halves(queries, rows), _halves(keys, columns)):
            yield from _tiles(queries, keys, *quarter)
    elif (mask := visible(mine, theirs)).any():
        yield Tile(rows, columns, ~mask)


def told(queries: Batch, keys: Batch) -> bool | None:
    """Whether all queries see all keys, or none sees any; None if the bounds of documents and positions do not tell."""
    q_documents, k_documents, q_positions, k_positions = (
        numbers.aminmax(dim=1) for numbers in (queries.documents, keys.documents, queries.positions, keys.positions)
    )
    apart = (k_documents.min > q_documents.max) | (k_documents.max < q_documents.min)
    if (apart | (k_positions.min > q_positions.max)).all():
        return False
    same = (k_documents.min == q_documents.max) & (k_documents.max == q_documents.min)
    return True if (same & (k_positions.max <= q_positions.min)).all() else None


def _halves(batch: Batch, span: slice) -> list[slice]:
    """A span of columns cut where the sequence is interrupted, or in the middle; a short one as it is."""
    if span.stop - span.start <= TILE:
        return [span]
    first, *others = _runs(batch.columns[span])
    at = span.start + (first.stop if others else first.stop // 2)
    return [slice(span.start, at), slice(at, span.stop)]


class Forward:
    """Queries [B, H, S, E] of one rank, and what they have gathered from the keys and values met so far."""

    def __init__(self, q: Tensor) -> None:
        self._dtype, self._q = q.dtype, _dense(q, wide(q.dtype))
        self._out = torch.zeros_like(self._q)
        self._lse = self._q.new_full(q.shape[:3], -torch.inf)

    def add(self, kv: Tensor, tiles: Sequence[Tile]) -> None:
        """Attend to a block's keys and values [2, B, G, S, E]."""
        kv = _dense(kv, self._q.dtype)
        for tile in tiles:
            q, out, lse = (x[:, :, tile.queries] for x in (self._q, self._out, self._lse))
            merge(out, lse, *_attend(q, kv[:, :, :, tile.keys], tile))

    def result(self) -> tuple[Tensor, Tensor]:
        """What attention returns, [B, H, S, E], and the log-sum-exp of each query's scores, [B, H, S]."""
        return self._out.to(self._dtype), self._lse


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Make of a result [B, H, Q, E] and its log-sum-exp [B, H, Q] those of more keys."""
    torch.logaddexp(lse, more_lse, out=lse)
    out.lerp_(more, (more_lse - lse).exp_()[..., None])


class Backward:
    """The way back: from the gradient of the result [B, H, S, E] to that of the queries, and of each block's keys."""

    def __init__(self, q: Tensor, out: Tensor, lse: Tensor, grad: Tensor) -> None:
        self._grad, self._q, self._out = (_dense(tensor, wide(q.dtype)) for tensor in (grad, q, out))
        self._lse, self._dq = lse, torch.zeros_like(self._q)

    def add(self, kv: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """What these queries give to the gradients of a block's keys and values, [2, B, G, S, E]."""
        kv = _dense(kv, self._q.dtype)
        grads = torch.zeros_like(kv)
        for tile in tiles:
            grad, q, out, lse = (x[:, :, tile.queries] for x in (self._grad, self._q, self._out, self._lse))
            dq, *dkv = _attend_backward(grad, q, kv[:, :, :, tile.keys], out, lse, tile)
            self._dq[:, :, tile.queries] += dq
            for grad_sum, part in zip(grads, dkv, strict=True):
                grad_sum[:, :, tile.keys] += part
        return grads

    def result(self) -> Tensor:
        """The gradient of the queries, [B, H, S, E]."""
        return self._dq


def _attend(q: Tensor, kv: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Result [B, H, Q, E] and log-sum-exp [B, H, Q]; 0 and minus infinity where all keys are hidden."""
    k, v = kv
    if fused(q):
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = op(q, k, v, is_causal=tile.triangle, attn_mask=_bias(q, tile))
        if tile.hidden is not None:
            lse = lse.masked_fill(tile.hidden.all(-1), -torch.inf)
        return out, lse
    scores, v = _scores(q, k, tile), _each_head(v, q)
    lse = scores.logsumexp(-1)
    return (scores - lse.nan_to_num(neginf=0)[..., None]).exp_() @ v, lse


def _attend_backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the result, where `out` and `lse` are those of all keys there are."""
    k, v = kv
    if fused(q):
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = op(grad, q, k, v, out, lse, 0.0, tile.triangle, attn_mask=_bias(q, tile))
        return dq, dk, dv
    weights = (_scores(q, k, tile) - lse[..., None]).exp_()
    ds = (grad @ _each_head(v, q).mT - (out * grad).sum(-1, keepdim=True)) * weights * q.shape[-1] ** -0.5
    dk, dv = (each.unflatten(1, (k.shape[1], -1)).sum(2) for each in (ds.mT @ q, weights.mT @ grad))
    return ds @ _each_head(k, q), dk, dv


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, a head's elements side by side: the kernel takes that for granted, and does not look."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def fused(tensor: Tensor) -> bool:
    """Whether torch has a kernel there, of any dtype, that keeps no scores and in backward takes any log-sum-exp."""
    return tensor.device.type == "cpu"


def _bias(q: Tensor, tile: Tile) -> Tensor | None:
    """What the kernel adds to the scores, [B, 1, Q, K]."""
    if tile.hidden is None:
        return None
    return torch.zeros_like(tile.hidden, dtype=q.dtype).masked_fill_(tile.hidden, -torch.inf)


def _scores(q: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """[B, H, Q, E], [B, G, K, E] -> [B, H, Q, K], minus infinity where a key is hidden."""
    scores: Tensor = q @ _each_head(k, q).mT * q.shape[-1] ** -0.5
    hidden = scores.new_ones(scores.shape[2:], dtype=torch.bool).triu(1) if tile.triangle else tile.hidden
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _each_head(x: Tensor, q: Tensor) -> Tensor:
    """[B, G, K, E] -> [B, H, K, E]: keys or values of each query head."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _runs(columns: Tensor) -> list[slice]:
    """Where columns follow one another in the sequence."""
    jumps = (columns.diff() != 1).nonzero()[:, 0] + 1
    return [slice(*ends) for ends in pairwise([0, *jumps.tolist(), len(columns)])]
