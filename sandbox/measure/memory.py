"""Memory of a rank, in bytes of tensor storage: what it holds, and the most that was alive at once.

A storage is what the allocator hands out. A view costs nothing, a storage shrunk to nothing (units.py) costs nothing,
and two tensors in one storage cost it once. What a kernel allocates and frees within itself is not seen, nor are the
buffers of gloo and of Python.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from sandbox.measure.operations import Operations
from sandbox.program import Program

__all__ = ["Peak", "held"]


def held(program: Program, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state on this rank. The first kind to claim a storage has it."""
    return _by_kind(_storages(_params(program), optimizer))


class Peak:
    """The most bytes alive at once on this rank between entry and exit, from what `program` and `optimizer` hold on.

    With `by_kind`, `kinds` splits them as they were at that moment; "other" is activations, buffers, and gradients on
    their way. It may be entered again and goes on: what is made in between is not counted. On a GPU the allocator is
    asked instead, for its total. A step of a tiny model takes half as long again, `by_kind` twice to three times; its
    results stay the same to the bit.
    """

    def __init__(self, program: Program, optimizer: Optimizer, *, by_kind: bool = False) -> None:
        self.bytes = 0
        self._by_kind = by_kind
        self.kinds: dict[str, int] = {}
        self._params, self._optimizer = _params(program), optimizer
        self._device = self._params[0].device
        self._tally = _Tally(self._rose)

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._tally.see(storage for _, storage in _storages(self._params, self._optimizer))
            self._tally.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self._device))
        else:
            self._tally.__exit__(kind, error, trace)

    def _rose(self, total: int) -> None:
        if total <= self.bytes:
            return
        self.bytes = total
        if self._by_kind:
            kinds = _by_kind(_storages(self._params, self._optimizer))
            self.kinds = {**kinds, "other": total - sum(kinds.values())}


class _Tally(Operations):
    """Bytes of all storages it was shown or saw in an operation, forwards or backwards, until each is really gone."""

    def __init__(self, rose: Callable[[int], None]) -> None:
        super().__init__()
        self._rose = rose
        self._total = 0
        self._live: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def see(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Count what is new, and what has another size than before."""
        before = self._total
        for storage in storages:
            key, size = storage._cdata, storage.nbytes()
            known = self._live.get(key)
            if known is None:  # the Python object of a storage lives as long as the storage, so it can tell of its end
                self._live[key] = size, weakref.ref(storage, partial(self._gone, key))
                self._total += size
            elif known[0] != size:
                self._live[key] = size, known[1]
                self._total += size - known[0]
        if self._total > before:
            self._rose(self._total)

    def _gone(self, key: int, _: object) -> None:
        self._total -= self._live.pop(key)[0]

    def __enter__(self) -> Any:
        self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            self.see([storage])
            return result

        # not an operation, so no mode sees it
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def operate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Count what an operation made."""
        out = func(*args, **kwargs)
        if not func.is_view:
            self.see(_made(out))
        return out


def _made(out: Any) -> Iterator[torch.UntypedStorage]:
    """Storages of all tensors that an operation returned; in-place ones return what they changed."""
    if isinstance(out, Tensor):
        if not out.is_meta:
            yield out.untyped_storage()
    elif isinstance(out, (list, tuple)):
        for item in out:
            yield from _made(item)


def _params(program: Program) -> list[Tensor]:
    params = list(program.model.parameters())
    elsewhere = [p.ds_tensor for p in params if hasattr(p, "ds_tensor")]  # DeepSpeed's stage 3 keeps parts aside
    return [*params, *elsewhere, *program.parameters.values()]


def _storages(params: Sequence[Tensor], optimizer: Optimizer) -> Iterator[tuple[str, torch.UntypedStorage]]:
    """What training keeps on this rank, kind by kind. One element is not worth counting: an optimizer's step."""
    yield from (("parameters", _storage(param)) for param in params)
    yield from (("gradients", _storage(param.grad)) for param in params if param.grad is not None)
    inner = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer wraps the one that has the state
    for state in inner.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.dim():
                yield "optimizer", _storage(value)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """Of a DTensor, that of its local part; taken without `to_local`, an operation, for this runs within others."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage()


def _by_kind(storages: Iterable[tuple[str, torch.UntypedStorage]]) -> dict[str, int]:
    claimed: set[int] = set()
    kinds = {"parameters": 0, "gradients": 0, "optimizer": 0}
    for kind, storage in storages:
        if storage._cdata not in claimed:
            claimed.add(storage._cdata)
            kinds[kind] += storage.nbytes()
    return kinds
