"""What launched ranks do in test_torch_axes.py. Imports of pytest stay outside."""

from typing import Any

import torch
import world
from torch import Tensor
from torch.nn import functional as F

from sandbox.batch import Batch
from sandbox.blockwise import Share
from sandbox.comm import Axis
from sandbox.config import Config
from sandbox.engines.torch import pipeline
from sandbox.mesh import Mesh
from sandbox.ring import Ring
from sandbox.runtime import Member
from sandbox.strategies.context import columns

ROWS, HEADS, SEQUENCE, WIDTH = 2, 3, 24, 8


def evaluated_by_torch_alone(member: Member, config: Config) -> None:
    """Validate by torch's schedule as it is."""
    pipeline.forwards = iter  # type: ignore[assignment]
    world.losses(member, config)


def rings(member: Member, order: str) -> list[Tensor]:
    """Ours and torch's ring, the same inputs: output and gradients of q, k, v of each, and those of one process."""
    axis = Mesh({"cp": member.world}, member.rank, "cpu").axis("cp")
    draw = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, ROWS, HEADS, SEQUENCE, WIDTH, generator=draw, dtype=torch.float64)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*whole, is_causal=True)
    expected = [expected, *torch.autograd.grad(expected, whole, grad)]
    mine = columns(SEQUENCE, axis.size, order)
    own = mine[axis.rank]
    q, k, v, grad = (x[:, :, own] for x in (q, k, v, grad))
    share = Share.of(batch(), mine, axis.rank)
    ours = ring(q, k, v, grad, share, axis)
    theirs = torchs_ring(q, k, v, grad, axis, zigzag=order == "zigzag")
    return [torch.stack(list(part)) for part in ((x[:, :, own].detach() for x in expected), ours, theirs)]


def batch() -> Batch:
    """One document a row."""
    grid = torch.arange(SEQUENCE).expand(ROWS, -1)
    return Batch(grid, grid, grid, 0 * grid, torch.arange(ROWS), torch.arange(SEQUENCE), key=0)


def ring(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, share: Share, axis: Axis) -> list[Tensor]:
    """Output and gradients of this rank's q, k, v."""
    q, kv = q.clone().requires_grad_(), torch.stack((k, v)).requires_grad_()
    out = Ring.apply(q, kv, share, axis)
    dq, dkv = torch.autograd.grad(out, (q, kv), grad)
    return [out.detach(), dq, *dkv]


def torchs_ring(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, axis: Axis, *, zigzag: bool) -> list[Tensor]:
    """The same by what torch's `context_parallel` would call, with the kernel that DTensor has no rule for."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    cp._cp_options.enable_load_balance, cp._cp_options.convert_to_f32 = zigzag, False
    op: Any = torch.ops.aten
    forward = op._scaled_dot_product_flash_attention_for_cpu
    backward = op._scaled_dot_product_flash_attention_for_cpu_backward
    assert axis.group is not None
    out, lse = cp._templated_ring_attention(axis.group, 2, forward, q, k, v, is_causal=True, dropout_p=0.0)
    grads = cp._templated_ring_attention_backward(
        axis.group, 2, backward, grad, "grad_out", q, k, v, out, lse, is_causal=True, dropout_p=0.0
    )
    return [out, *grads[:3]]
