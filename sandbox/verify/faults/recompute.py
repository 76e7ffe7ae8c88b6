"""Bugs of activation checkpointing, planted where backward computes a block again."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sandbox.batch import Batch
from sandbox.model import Block, dropout
from sandbox.trainer import Trainer
from sandbox.verify.faults.planting import fault, patch

FULL = {"recompute": "full"}


@fault(48, "allenai/OLMo-core/pull/828", "backward", "ddp", train=FULL)
def computed_again_under_other_masks(trainer: Trainer) -> None:
    """The generator's state is not restored, so dropout drops other features when a block is computed again."""
    kept = dropout.kept

    def drawn(batch: Batch, *args: Any) -> Tensor:
        again = torch._C._current_graph_task_id() != -1  # within a backward pass
        return kept(replace(batch, key=batch.key + again), *args)

    patch(dropout, "kept", drawn)


@fault(48, "ooples/AiDotNet.Tensors/pull/643", "backward", "zero2", train=FULL)
def computed_again_without_its_weights(trainer: Trainer) -> None:
    """Backward through what is computed again leads to the block's input only: the weights in it get no gradient."""
    for block in trainer.program.model.modules():
        if isinstance(block, Block):
            patch(block, "forward", partial(_to_the_input_only, partial(Block.forward, block)))


def _to_the_input_only(function: Callable[[Tensor, Batch], Tensor], x: Tensor, batch: Batch) -> Tensor:
    out: Tensor = _ToTheInputOnly.apply(x, batch, function)  # type: ignore[no-untyped-call]
    return out


class _ToTheInputOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, function: Callable[[Tensor, Batch], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.again = function, batch
        return function(x, batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (saved,), (function, batch) = ctx.saved_tensors, ctx.again
        with torch.enable_grad():
            x = saved.detach().requires_grad_()
            return *torch.autograd.grad(function(x, batch), x, grad), None, None
