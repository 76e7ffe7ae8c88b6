"""Tensor and sequence parallelism for a model that somebody brings along: which module is cut how, by name.

    plan                module      weight           in forward                          in backward
    column              Linear      W[F_tp, D]       X -> its own features Y_n           G{U} -> G of X, all_reduce
    column, gathered    Linear      W[F_tp, D]       X -> Y_n -> Y, all_gather           as column
    row                 Linear      W[D, F_tp]       X_n -> Y{U} -> Y, all_reduce        G of X_n, its own
    words               Embedding   W[V_tp, D]       its own words -> Y{U} -> Y          -
    shared              any         whole            used on a rank's own part           G{U} -> G, all_reduce

With `sequence`, what lies between is cut along dimension 1, [B, S_n, D]; parts may be uneven:

    words, row          as above                     Y{U} -> Y_n, reduce_scatter         G_n -> G, all_gather
    column              as above                     X_n -> X, all_gather                G{U} -> G_n, reduce_scatter
    whole sequence      any         as it is         its input X_n -> X, all_gather      G -> its own G_n

Everything else is whole on every rank and does the same on each. Sizes that are cut must divide, and cut between heads
where the model views features as heads. A bias is cut with its column, and added once after a row's sum.
"""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sandbox.comm import Axis, all_gather
from sandbox.errors import ConfigError
from sandbox.partition import even
from sandbox.program import Program, replace_parameters
from sandbox.regions import Border, share_weights, start_gather
from sandbox.row_parallel import look_up_own, sum_rows

__all__ = ["KINDS", "cut_modules"]

KINDS: dict[str, tuple[type[nn.Module], int | None]] = {
    "column": (nn.Linear, 0),
    "column, gathered": (nn.Linear, 0),
    "row": (nn.Linear, 1),
    "words": (nn.Embedding, 0),
    "shared": (nn.Module, None),
    "column, sequence": (nn.Linear, 0),
    "column, sequence, gathered": (nn.Linear, 0),
    "row, sequence": (nn.Linear, 1),
    "words, sequence": (nn.Embedding, 0),
    "whole sequence": (nn.Module, None),
}
"""What a plan may say -> the kind of module, and the dimension of its weight that is cut."""


def cut_modules(program: Program, model: nn.Module, plan: Sequence[tuple[str, str]], axis: Axis) -> Program:
    """Return `program` with modules of `model` cut over `axis`. Raises ConfigError: the plan does not fit the model."""
    borders, layout = (_Border(axis, sequence=False), _Border(axis, sequence=True)), dict(program.layout)
    chosen = _chosen(model, plan)
    new: dict[str, nn.Parameter] = {}
    for path, (module, kind) in chosen.items():
        for name, param in module.named_parameters(prefix=path, recurse=False):
            dim = KINDS[kind][1]
            if name not in layout or name in new or dim is None or (dim == 1 and name.endswith("bias")):
                continue  # the second name of a tied weight, or whole
            part, left = divmod(param.shape[dim], axis.size)
            if left:
                raise ConfigError(
                    f"modules: {path} is {kind}, but {param.shape[dim]} features do not divide over {axis.size} ranks."
                )
            layout[name] = layout[name].cut(dim, axis.rank * part, (axis.rank + 1) * part, axis.names)
            new[name] = nn.Parameter(param.detach().narrow(dim, axis.rank * part, part).clone())
    replace_parameters(model, new)
    for module, kind in chosen.values():
        _run_cut(module, kind, borders["sequence" in kind])
    return replace(program, layout=layout, parameters=dict(program.model.named_parameters()))


def _chosen(model: nn.Module, plan: Sequence[tuple[str, str]]) -> dict[str, tuple[nn.Module, str]]:
    """Path -> module and kind; of several patterns that match, the last counts."""
    chosen: dict[str, tuple[nn.Module, str]] = {}
    for pattern, kind in plan:
        if kind not in KINDS:
            raise ConfigError(f"modules: {kind!r} is not one of {', '.join(map(repr, KINDS))}.")
        matches = {path: module for path, module in model.named_modules() if fnmatchcase(path, pattern)}
        wrong = [path for path, module in matches.items() if not isinstance(module, KINDS[kind][0])]
        if not matches or wrong:
            what = f"{wrong[0]} is a {type(matches[wrong[0]]).__name__}" if wrong else f"nothing is called {pattern!r}"
            raise ConfigError(f"modules: {what}; {kind} is for a {KINDS[kind][0].__name__}.")
        chosen |= {path: (module, kind) for path, module in matches.items()}
    return chosen


def _run_cut(module: Any, kind: str, border: Border) -> None:
    axis = border.axis

    def column(x: Tensor) -> Tensor:
        return border.linears(x, module)[0]

    def gathered(x: Tensor) -> Tensor:
        out: Tensor = _Gather.apply(column(x), axis)  # type: ignore[no-untyped-call]
        return out

    match kind.replace(", sequence", ""):
        case "column":
            module.forward = column
        case "column, gathered":
            module.forward = gathered
        case "row":
            sum_rows(module, border)
            if border.sequence and module.bias is not None:  # which is added to a rank's own columns
                share_weights(module, [(module, "bias")], axis)
        case "words":
            held = module.weight.shape[0]
            look_up_own(module, range(axis.rank * held, (axis.rank + 1) * held), module.weight.dtype, border)
        case "shared":
            names = [name for name, _ in module.named_parameters()]
            owners = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
            share_weights(module, owners, axis)
        case _:  # the whole sequence
            module.register_forward_pre_hook(partial(_whole, border), with_kwargs=True)


class _Border(Border):
    """A border that finds out by itself how many columns there are."""

    def leave(self, x: Tensor) -> Tensor:
        """As `Border.leave`; the columns are noted for those that put them together again."""
        self.columns[:] = even(x.shape[1], self.axis.size)
        return super().leave(x)


def _whole(border: Border, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a module, with the columns of all ranks in the first that is a tensor of floats."""
    args, columns = list(args), tuple(border.columns)
    places: list[tuple[Any, Any]] = [(args, i) for i in range(len(args))] + [(kwargs, name) for name in kwargs]
    for arguments, place in places:
        x = arguments[place]
        if isinstance(x, Tensor) and x.is_floating_point():
            arguments[place] = _Columns.apply(x, columns, border.axis)  # type: ignore[no-untyped-call]
            break
    return tuple(args), kwargs


class _Columns(torch.autograd.Function):
    """Own columns [B, S_n, D] -> all of them [B, S, D], on every rank alike; so in backward a rank takes its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.own = sum(sizes[: axis.rank]), sizes[axis.rank]
        return start_gather(x, sizes, axis)()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(1, *ctx.own).contiguous(), None, None


class _Gather(torch.autograd.Function):
    """Own features [..., F_tp] -> all of them [..., F], on every rank alike; so in backward a rank takes its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.width = axis, x.shape[-1]
        parts = x.new_empty(axis.size, *x.shape)
        parts[axis.rank] = x
        all_gather(parts.view(-1), [x.numel()] * axis.size, axis).wait()
        return torch.cat(list(parts), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.axis.rank * ctx.width, ctx.width).contiguous(), None
