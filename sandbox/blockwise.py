"""Attention to keys that arrive block by block: exact, in whatever order they come, and without all scores at once.

Forward keeps, for each query, the largest score so far m, the sum l of exp(score - m), and the sum o of
exp(score - m) v. A block of keys updates them:

    m' = max(m, largest s)        l' = e^(m - m') l + sum e^(s - m')        o' = e^(m - m') o + e^(s - m') v

and after the last one out = o / l, and the log-sum-exp of all scores is L = m + log l. Backward needs L alone to have
any block's probabilities again, p = e^(s - L), and with D = sum(out dout) of each query

    dv = p^T dout        ds = p (dout v^T - D)        dq = ds k        dk = ds^T q

so each block's dk and dv are finished by itself and can travel on. Sums are at least float32.

A block is worked on in tiles of at most TILE x TILE scores. Tiles that no query may look into are left out, so what is
computed follows from the mask alone: causal, packed or padded.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention",
NeurIPS 2022; Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023.

Shapes: B rows, H heads, G key/value heads, R = H / G, S columns, E width of a head; Q and K columns of a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from sandbox.batch import Batch
from sandbox.model import visible
from sandbox.model.layers import wide

__all__ = ["TILE", "Backward", "Forward", "Share", "Tile"]

TILE = 256
"""Columns of a tile: its scores fit the cache, and its products are large enough for the processor."""


@dataclass(frozen=True)
class Tile:
    """Some of the queries against some keys of a block. `hidden` [B, 1, 1, Q, K] is None if all see all."""

    queries: int  # which of the spans of columns that the queries are cut into
    keys: slice
    hidden: Tensor | None


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
    def spans(self) -> list[list[slice]]:
        """By rank: its columns, cut into runs that follow one another in the sequence, of at most TILE."""
        return [_runs(columns) for columns in self.columns_of]

    @cached_property
    def pieces(self) -> list[tuple[int, slice]]:
        """All runs in the order of the sequence: the rank that holds it, and where among its columns."""
        runs = [(rank, span) for rank, spans in enumerate(self.spans) for span in spans]
        return sorted(runs, key=lambda run: int(self.columns_of[run[0]][run[1].start]))

    @cached_property
    def tiles(self) -> list[list[Tile]]:
        """By rank: which tiles of its keys this rank's queries look into.

        Of the rank's own block those on the diagonal come first: every token sees itself, so each query meets a score
        that is finite before any tile that hides all keys from it.
        """
        return [self._tiles(source) for source in range(len(self.columns_of))]

    def _tiles(self, source: int) -> list[Tile]:
        other = self.whole.take_columns(self.columns_of[source])
        tiles = []
        for number, queries in enumerate(self.spans[self.rank]):
            mine = self.take_columns(queries)
            keys = self.spans[source]
            for span in sorted(keys, key=lambda span: span != queries) if source == self.rank else keys:
                seen = visible(mine, other.take_columns(span))
                if seen.any():
                    tiles.append(Tile(number, span, None if seen.all() else ~seen[:, None]))
        return tiles


class Forward:
    """Queries [B, H, S, E] of one rank, and what they have gathered from the keys and values met so far."""

    def __init__(self, q: Tensor, groups: int, spans: Sequence[slice]) -> None:
        scaled = q.to(wide(q.dtype)) * q.shape[-1] ** -0.5
        self._q = [_stack(scaled, span, groups) for span in spans]  # each [B, G, R Q, E]
        self._sums = [torch.zeros_like(part) for part in self._q]
        self._totals = [part.new_zeros(*part.shape[:-1], 1) for part in self._q]
        self._largest = [torch.full_like(total, -torch.inf) for total in self._totals]
        self._heads, self._dtype = q.shape[1], q.dtype

    def add(self, kv: Tensor, tiles: Sequence[Tile]) -> None:
        """Attend to a block's keys and values [2, B, G, S, E]."""
        keys, values = kv.to(self._q[0].dtype)
        for tile in tiles:
            at = tile.queries
            scores = _scores(self._q[at], keys[:, :, tile.keys], tile)
            largest = torch.maximum(self._largest[at], scores.amax(-1, keepdim=True))
            shrink = (self._largest[at] - largest).exp_()
            weights = scores.sub_(largest).exp_()
            self._totals[at].mul_(shrink).add_(weights.sum(-1, keepdim=True))
            self._sums[at].mul_(shrink).add_(weights @ values[:, :, tile.keys])
            self._largest[at] = largest

    def result(self) -> tuple[Tensor, Tensor]:
        """What attention returns, [B, H, S, E], and the log-sum-exp of each query's scores, [B, H, S, 1]."""
        out = [sums / total for sums, total in zip(self._sums, self._totals, strict=True)]
        lse = [largest + total.log() for largest, total in zip(self._largest, self._totals, strict=True)]
        return _unstack(out, self._heads).to(self._dtype), _unstack(lse, self._heads)


class Backward:
    """The way back: from the gradient of the result [B, H, S, E] to that of the queries, and of each block's keys."""

    def __init__(self, q: Tensor, out: Tensor, lse: Tensor, grad: Tensor, groups: int, spans: Sequence[slice]) -> None:
        dtype = wide(q.dtype)
        self._scale, self._heads = q.shape[-1] ** -0.5, q.shape[1]
        scaled, grad = q.to(dtype) * self._scale, grad.to(dtype)
        inner = (out.to(dtype) * grad).sum(-1, keepdim=True)
        self._q, self._lse, self._grad, self._inner = (
            [_stack(tensor, span, groups) for span in spans] for tensor in (scaled, lse, grad, inner)
        )
        self._dq = [torch.zeros_like(part) for part in self._q]

    def add(self, kv: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """What these queries give to the gradients of a block's keys and values, [2, B, G, S, E]."""
        keys, values = kv = kv.to(self._q[0].dtype)
        grads = torch.zeros_like(kv)
        for tile in tiles:
            at = tile.queries
            k, v = keys[:, :, tile.keys], values[:, :, tile.keys]
            weights = _scores(self._q[at], k, tile).sub_(self._lse[at]).exp_()
            grads[1][:, :, tile.keys] += weights.mT @ self._grad[at]
            ds = (self._grad[at] @ v.mT).sub_(self._inner[at]).mul_(weights)
            grads[0][:, :, tile.keys] += ds.mT @ self._q[at]
            self._dq[at] += ds @ k
        return grads

    def result(self) -> Tensor:
        """The gradient of the queries, [B, H, S, E]."""
        return _unstack(self._dq, self._heads).mul_(self._scale)


def _scores(q: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """[B, G, R Q, E], [B, G, K, E] -> [B, G, R Q, K], minus infinity where a key is hidden."""
    scores: Tensor = q @ k.mT
    if tile.hidden is not None:
        scores.unflatten(2, (-1, tile.hidden.shape[-2])).masked_fill_(tile.hidden, -torch.inf)
    return scores


def _stack(x: Tensor, span: slice, groups: int) -> Tensor:
    """[B, H, S, E] -> [B, G, R Q, E]: heads that share keys side by side, so that one product serves them all."""
    stacked: Tensor = x[:, :, span].unflatten(1, (groups, -1)).flatten(2, 3)
    return stacked


def _unstack(parts: Sequence[Tensor], heads: int) -> Tensor:
    """Back again, of all spans."""
    ratio = heads // parts[0].shape[1]
    return torch.cat([part.unflatten(2, (ratio, -1)) for part in parts], dim=3).flatten(1, 2)


def _runs(columns: Tensor) -> list[slice]:
    jumps = (columns.diff() != 1).nonzero()[:, 0] + 1
    ends = [0, *jumps.tolist(), len(columns)]
    return [slice(at, min(at + TILE, stop)) for start, stop in pairwise(ends) for at in range(start, stop, TILE)]
