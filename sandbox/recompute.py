"""Activation checkpointing: what backward needs is computed again from a few tensors that are kept, instead of kept.

    train.recompute    kept of a block                 computed again in backward
    none               whatever its operations save    -
    selective          as none, but nothing of core    attention's core: scores, softmax, and the product with values
    full               its input, X[B, S, D]           the block

`core` is attention as context parallelism has left it; a block includes what tensor parallelism put into it. So their
collectives run again, and their predictions count them. Data parallelism is folded over this: its gathers stay outside,
and the one for a block's backward serves what is computed again too. Kept between forward and backward, with `full`:
L B S D elements for L blocks, and one block's activations while it goes backward, L being the blocks of a stage times
the microbatches that it has under way. `selective` saves as much as the kernel keeps: B H S S scores, or next to
nothing if it is one that keeps none (FlashAttention).

Computing stops at the last tensor that backward needs, so a sum at the end of a block is not taken again unless dropout
follows. Dropout draws the same masks without a state to restore, for they depend on the batch alone (dropout.py).

Sources: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", MLSys 2023 (selective).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from sandbox.model import Attention, Block

__all__ = ["recompute"]


def recompute(model: nn.Module, what: Literal["none", "selective", "full"]) -> None:
    """Have `model` compute again in backward what `train.recompute` says. Hooks on blocks stay outside."""
    for module in model.modules():
        if what == "full" and isinstance(module, Block):
            module.forward = _again(module.forward)  # type: ignore[method-assign]
        elif what == "selective" and isinstance(module, Attention):
            module.core = _again(module.core)


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around what is computed, and around computing it again: the modes that are on now, which are off in backward.

    So a zero-bubble schedule puts off the same weights' gradients both times.
    """
    return nullcontext(), _entered(_get_current_function_mode_stack())


@contextmanager
def _entered(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield
