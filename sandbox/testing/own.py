"""A model, a loss and a batch that somebody brings along, in the shape that trainer and strategies know.

To the trainer the batch is a grid of row numbers: it is cut over ranks and microbatches as any other, and the rows
themselves are looked up where the model runs. The model that strategies see maps those numbers to the sum of losses;
its parameters have the names that its author gave them, and what is gathered together stands under `blocks`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sandbox.batch import IGNORED, Batch
from sandbox.config import Config
from sandbox.data import Corpus
from sandbox.errors import ConfigError
from sandbox.mesh import Mesh
from sandbox.program import Program, empty, replace_parameters
from sandbox.testing.modules import cut_modules

__all__ = ["LossFn", "OwnModel", "Rows"]

LossFn = Callable[[nn.Module, Any], tuple[Tensor, int]]
"""`loss_fn(model, batch)`: the sum of the losses of a batch's rows, and how many losses that sums up."""


@dataclass(frozen=True)
class OwnModel:
    """A subject of the verifier. It is sent to the ranks, so both functions are those of a module that can be imported.

    `counts`: losses of each row [B], so that all ranks know the number for the whole step before backward begins.
    """

    build_model: Callable[[], nn.Module]
    loss_fn: LossFn
    data: Any  # a pytree; its tensors are cut along dimension 0
    blocks: tuple[str, ...] | None = None  # None: the children of each outermost ModuleList
    modules: tuple[tuple[str, str], ...] = ()  # pattern of names -> how it is cut over tp
    dtype: torch.dtype = torch.float64
    seed: int = 0
    counts: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return min(len(t) for t in tree_leaves(self.data) if isinstance(t, Tensor))

    def take(self, index: Tensor) -> Any:
        """Those rows of the batch."""
        return tree_map(lambda t: self._cast(t)[index] if isinstance(t, Tensor) else t, self.data)

    def model(self) -> nn.Module:
        """The model with its first values: the same ones with each call."""
        torch.manual_seed(self.seed)
        with default_dtype(self.dtype), self.precision():
            return self.build_model().to(self.dtype).train()

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """Loss and count, checked. Raises ConfigError: they are something else."""
        with self.precision():
            out = self.loss_fn(model, batch)
        if not isinstance(out, tuple) or len(out) != 2 or not isinstance(out[0], Tensor) or out[0].numel() != 1:
            raise ConfigError(
                f"loss_fn returned {_kind(out)}: return (the sum of the losses, as a tensor of one element; their "
                "number), such as F.cross_entropy(..., reduction='sum'), targets.numel()."
            )
        if float(out[1]) != int(out[1]):
            raise ConfigError(f"loss_fn counts {float(out[1])} losses: return a whole number.")
        return out[0].sum(), int(out[1])

    def precision(self) -> AbstractContextManager[Any]:
        """Where the model runs. In float64 all of it does, whatever its author casts to float32."""
        return _AllDouble() if self.dtype == torch.float64 else nullcontext()

    def open(self, config: Config, mesh: Mesh, device: torch.device) -> tuple[Corpus, Program]:
        """The subject's batches, and its program, cut over tp if `modules` say how."""
        model = self.model().to(device)
        values = {name: param.detach() for name, param in model.named_parameters()}
        bound = _Bound(model, self)
        replace_parameters(model, {name: nn.Parameter(value.to("meta")) for name, value in values.items()})
        start = replace(empty(config, mesh, bound, values.__getitem__), loss=lambda out, targets: out)
        if mesh.axis("tp").size > 1:
            start = cut_modules(start, model, self.modules, mesh.axis("tp"))
        return cast(Corpus, Rows(self.counts)), start

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Rows:
    """Batches of row numbers. Each step sees the same rows, in another order."""

    counts: tuple[int, ...]

    def batch(self, step: int, *, seed: int, rows: int) -> Batch:
        """[B, C] grids for the largest count C: `tokens` hold a row's number, valid `targets` are as many as it has."""
        row = (torch.arange(rows) + step) % rows
        column = torch.arange(max(1, *self.counts))
        counts = torch.tensor(self.counts)[row, None]
        grid = row[:, None].expand(-1, len(column))
        nothing = torch.zeros_like(grid)
        targets = torch.where(column < counts, 0, IGNORED)
        return Batch(grid, targets, nothing, nothing, torch.arange(rows), column, key=step)


class _Bound(nn.Module):
    """A model with its loss: row numbers to the sum of losses. Names are those of the model inside."""

    def __init__(self, model: nn.Module, own: OwnModel) -> None:
        super().__init__()
        self.model, self.dtype = model, own.dtype
        self.blocks = nn.ModuleDict({name.replace(".", "/"): block for name, block in _blocks(model, own.blocks)})
        self._own = own

    def forward(self, batch: Batch) -> Tensor:
        """[B, C] row numbers -> []."""
        return self._own.loss(self.model, self._own.take(batch.tokens[:, 0]))[0]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """By the names that they have without this wrapper."""
        if recurse:
            return self.model.named_parameters(prefix, recurse, remove_duplicate)
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """By the names that they have without this wrapper."""
        if recurse:
            return self.model.named_buffers(prefix, recurse, remove_duplicate)
        return super().named_buffers(prefix, recurse, remove_duplicate)


class _AllDouble(TorchFunctionMode):
    """Every float is a float64: a cast to float32, as in many a norm, would round the sums whose order is at issue."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        wide = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.float16: torch.float64}
        own = {key: wide.get(value, value) if _is_dtype(value) else value for key, value in (kwargs or {}).items()}
        return func(*(wide.get(value, value) if _is_dtype(value) else value for value in args), **own)


def _is_dtype(value: object) -> bool:
    return isinstance(value, torch.dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Have tensors made in `dtype`, where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _blocks(model: nn.Module, names: tuple[str, ...] | None) -> list[tuple[str, nn.Module]]:
    """What is gathered together, in forward order. A name stands for that module, of a ModuleList for its children."""
    modules = dict(model.named_modules())
    if names is None:
        lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
        names = tuple(name for name in lists if not any(name.startswith(f"{outer}.") for outer in lists))
    found: dict[str, nn.Module] = {}
    for pattern in names:
        matches = [name for name in modules if fnmatchcase(name, pattern)]
        if not matches:
            raise ConfigError(f"blocks: no module of {type(model).__name__} is called {pattern!r}.")
        for name in matches:
            if isinstance(modules[name], nn.ModuleList):
                found.update({f"{name}.{key}": child for key, child in modules[name].named_children()})
            else:
                found[name] = modules[name]
    found = {name: block for name, block in found.items() if next(block.parameters(), None) is not None}
    homes: dict[nn.Parameter, set[str]] = defaultdict(set)
    for name, param in model.named_parameters(remove_duplicate=False):
        homes[param].add(next((block for block in found if name.startswith(f"{block}.")), "the rest of the model"))
    for param, owners in homes.items():
        if len(owners) > 1:
            name = next(name for name, other in model.named_parameters() if other is param)
            raise ConfigError(f"blocks: {' and '.join(sorted(owners))} share {name}. Name blocks that share nothing.")
    return list(found.items())


def _kind(out: Any) -> str:
    if isinstance(out, Tensor):
        return f"a tensor of shape {list(out.shape)} alone"
    return f"a {type(out).__name__}" + (f" of {len(out)}" if isinstance(out, tuple) else "")
