"""Looking at every operation on plain tensors, forwards and backwards, as it is dispatched."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Operations"]


class Operations(TorchDispatchMode):
    """While entered, `operate` is called in place of each operation on plain tensors, and has to perform it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def operate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return `func(*args, **kwargs)`."""
        raise NotImplementedError

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import torch._dynamo, which takes a second, to keep it away from here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a wrapper, such as DTensor: its own dispatch comes back with the tensors inside
        return self.operate(func, args, kwargs or {})
