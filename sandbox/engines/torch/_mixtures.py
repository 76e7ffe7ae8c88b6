"""Mixtures of experts in DTensors over tp: each expert is cut like an MLP (tensor.py), their sum taken once, weighted.

The router sees whole columns on every rank. What it sees and what experts see is one tensor forward. Backward, the
router's gradient of it is whole on each rank, and experts' a term of a sum; so is that of the gate weights.
"""

from typing import Any, cast

from torch import Tensor, nn

from sandbox.model import mixtures

__all__ = ["cut_mixtures"]


def cut_mixtures(model: nn.Module, mesh: Any, between: Any) -> None:
    """Have tokens of all mixtures enter and leave their experts as DTensors; the hidden state is cut as `between`."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_module

    def take(x: Tensor, forward: Any, backward: Any) -> DTensor:
        """A local tensor as DTensor, and its gradient back."""
        return DTensor.from_local(x, mesh, (forward,), run_check=False, grad_placements=(backward,))

    def give(x: Any, backward: Any) -> Tensor:
        """A DTensor's local tensor, whose gradient is what the ranks hold as `backward`."""
        return cast(DTensor, x).to_local(grad_placements=(backward,))

    def enter(x: Tensor) -> tuple[Tensor, Tensor]:
        whole = take(x, between, between).redistribute(placements=(Replicate(),))
        return give(whole, Replicate()), give(whole, Partial())

    def weigh(weights: Tensor) -> Tensor:
        return give(take(weights, Replicate(), Replicate()), Partial())

    def leave(x: Tensor) -> Tensor:
        return give(take(x, Partial(), Replicate()).redistribute(placements=(between,)), between)

    for moe in mixtures(model):
        moe.enter, moe.weigh, moe.leave = enter, weigh, leave
        for expert in moe.experts.values():
            distribute_module(
                expert,
                mesh,
                input_fn=cast(Any, lambda _, args, mesh: take(args[0], Replicate(), Partial())),
                output_fn=cast(Any, lambda _, out, mesh: give(out, Replicate())),
            )
