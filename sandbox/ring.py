"""How blocks of keys and values come to the queries: round a ring one by one, or gathered all at once.

In a ring, block b is passed from rank to rank while each computes with the block it has. Going backward the gradients
of its keys set out from rank b+1, gather what every rank adds, and come home after n-1 hops; what the home rank adds
never travels. They travel, and add up, in float32 at least; keys and values travel in the dtype of the model.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sandbox.blockwise import Backward, Forward, Share
from sandbox.comm import Axis, Pending, all_gather, pass_on, reduce_scatter

__all__ = ["Gather", "Ring"]


class Ring(torch.autograd.Function):
    """Keys and values go round once forward, and once backward with their gradients one step behind."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, batch: Share, axis: Axis) -> Tensor:
        """[B, H, S_cp, E], [2, B, G, S_cp, E] -> [B, H, S_cp, E]."""
        attention = Forward(q)
        for source, block in _round(kv, batch, axis):
            attention.add(block, batch.tiles[source])
        out, lse = attention.result()
        ctx.save_for_backward(q, kv, out, lse)
        ctx.batch, ctx.axis = batch, axis
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients of q and kv."""
        (q, kv, out, lse), batch, axis = ctx.saved_tensors, ctx.batch, ctx.axis
        attention = Backward(q, out, lse, grad)
        parts: dict[int, Tensor] = {}
        coming: Pending | None = None
        for source, block in _round(kv, batch, axis):
            parts[source] = attention.add(block, batch.tiles[source])
            if source != axis.rank:
                if coming:
                    parts[source] += coming.wait()
                coming = pass_on(parts[source], _room(parts.pop(source), batch, source - 1), axis)
        home = parts[axis.rank]
        if coming:
            home += coming.wait()
        return attention.result().to(q.dtype), home.to(kv.dtype), None, None


class Gather(torch.autograd.Function):
    """Keys and values of all ranks are gathered, and kept for backward; their gradients are reduced to their homes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, batch: Share, axis: Axis) -> Tensor:
        """[B, H, S_cp, E], [2, B, G, S_cp, E] -> [B, H, S_cp, E]."""
        blocks = [_room(kv, batch, rank) for rank in range(axis.size)]
        sizes = [block.numel() for block in blocks]
        flat = torch.cat([(kv if rank == axis.rank else block).flatten() for rank, block in enumerate(blocks)])
        all_gather(flat, sizes, axis).wait()
        blocks = [part.view_as(block) for part, block in zip(flat.split(sizes), blocks, strict=True)]
        attention = Forward(q)
        for source in _from(axis):
            attention.add(blocks[source], batch.tiles[source])
        out, lse = attention.result()
        ctx.save_for_backward(q, out, lse, *blocks)
        ctx.batch, ctx.axis = batch, axis
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients of q and kv."""
        (q, out, lse, *blocks), batch, axis = ctx.saved_tensors, ctx.batch, ctx.axis
        attention = Backward(q, out, lse, grad)
        parts = [attention.add(block, batch.tiles[source]) for source, block in enumerate(blocks)]
        flat = torch.cat([part.flatten().to(q.dtype) for part in parts])
        own = reduce_scatter(flat, [block.numel() for block in blocks], axis, parts[0].dtype).wait()
        return attention.result().to(q.dtype), own.view_as(parts[axis.rank]).to(q.dtype), None, None


def _round(kv: Tensor, batch: Share, axis: Axis) -> Iterator[tuple[int, Tensor]]:
    """Whose block, and the block: this rank's own, the previous one's, ... The next one comes during work on this."""
    for source in _from(axis):
        coming = None
        if source != (axis.rank + 1) % axis.size:
            coming = pass_on(kv, _room(kv, batch, source - 1), axis)
        yield source, kv
        if coming:
            kv = coming.wait()


def _from(axis: Axis) -> list[int]:
    """The ranks in the order in which their blocks come."""
    return [(axis.rank - step) % axis.size for step in range(axis.size)]


def _room(like: Tensor, batch: Share, rank: int) -> Tensor:
    """An empty block for the columns of `rank`."""
    return like.new_empty((*like.shape[:3], len(batch.columns_of[rank]), like.shape[4]))
