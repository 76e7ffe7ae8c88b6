"""Activation checkpointing: what backward needs is computed again from a few tensors that are kept, instead of kept.

    train.recompute    kept of a block                      computed again in backward
    none               whatever its operations save         -
    selective          as none; of attention X[B, S, D]     attention: projections, positions, scores
    full               its input, X[B, S, D]                the block

Attention is what context parallelism has left of it, and a block includes what tensor parallelism put into it. So their
collectives run again, and their predictions count them. Data parallelism is folded over this: its gathers stay outside,
and the one for a block's backward serves what is computed again too. Kept between forward and backward, with `full`:
L B S D elements for L blocks, and one block's activations while it goes backward, L being the blocks of a stage times
the microbatches that it has under way. In a zero-bubble pipeline, what is computed again for the gradients of inputs is
kept for those of weights, so `full` saves less the later these come.

Megatron's `selective` is the product with keys, softmax and the product with values alone: worth it where the kernel
keeps the scores. Those here keep none (FlashAttention, blockwise.py), so projections are computed again as well.

Computing stops at the last tensor that backward needs, so a sum at the end is not taken again unless dropout follows.
Dropout draws the same masks without a state to restore, for they depend on the batch alone (dropout.py).

Sources: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", MLSys 2023 (selective).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from sandbox.model import Attention, Block

__all__ = ["recompute"]


def recompute(model: nn.Module, what: Literal["none", "selective", "full"]) -> None:
    """Have `model` compute again in backward what `train.recompute` says. Hooks on blocks stay outside."""
    kinds: dict[str, tuple[type[nn.Module], ...]] = {"none": (), "selective": (Attention,), "full": (Block,)}
    for module in model.modules():
        if isinstance(module, kinds[what]):
            module.forward = _again(module.forward)


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around what is computed, and around computing it again: the modes that are on now, which are off in backward.

    So a zero-bubble schedule puts off the same weights' gradients both times.
    """
    return nullcontext(), _Entered(_get_current_function_mode_stack())


class _Entered:
    """Enters modes, as often as asked: torch's zero-bubble schedules compute again for inputs and again for weights."""

    def __init__(self, modes: Sequence[TorchFunctionMode]) -> None:
        self._modes = modes

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for mode in self._modes:
                stack.enter_context(mode)
            self._entered = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self._entered.close()
