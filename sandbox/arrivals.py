"""Which gradients have come in a backward pass, and which will not come any more.

What a rank has not used when backward comes to the output of the unit before, it does not use. Said so at once, all
ranks start the same collectives in the same order, whoever used which parameter.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from sandbox.program import Program

__all__ = ["Arrivals", "on_gradients"]


class Arrivals:
    """Tells a program of each gradient of a model, or that there will be none."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._coming, self._unused = set[str](), set[str]()

    def watch(self, program: Program) -> Program:
        """Return `program` with an eye on its backward passes."""
        self._tell = program.grad_ready

        def begin(final: bool) -> None:
            program.begin(final)
            self._coming, self._unused = set(self._names), set()

        return replace(program, begin=begin, grad_ready=self._came)

    def close(self, names: Collection[str]) -> None:
        """Backward is through with all of what uses the parameters `names`."""
        for name in names:
            if name in self._coming:
                self._came(name)
                self._unused.add(name)

    def _came(self, name: str) -> None:
        if name in self._unused:
            raise RuntimeError(f"the gradient of {name} came when backward was through with what follows its unit.")
        self._coming.discard(name)
        self._tell(name)


def on_gradients(out: Any, first: Callable[[], None], last: Callable[[], None]) -> None:
    """Have `last` called when backward has all gradients of a module's output; and `first` then, or when it has any."""
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]

    def both(grad: Tensor) -> None:
        last()
        first()

    if len(outs) == 1:
        outs[0].register_hook(both)  # at a tenth of the cost
    else:
        register_multi_grad_hook(outs, lambda grads: last(), mode="all")
        register_multi_grad_hook(outs, lambda grad: first(), mode="any")
