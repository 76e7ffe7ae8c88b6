"""Tensor parallelism for a model that somebody brings along: which module is cut how, by name.

    plan                module      weight           in forward                          in backward
    column              Linear      W[F_tp, D]       X -> its own features Y_n           G{U} -> G of X, all_reduce
    column, gathered    Linear      W[F_tp, D]       X -> Y_n -> Y, all_gather           as column
    row                 Linear      W[D, F_tp]       X_n -> Y{U} -> Y, all_reduce        G of X_n, its own
    words               Embedding   W[V_tp, D]       its own words -> Y{U} -> Y          -
    shared              any         whole            used on a rank's own features       G{U} -> G, all_reduce

Everything else is whole on every rank and does the same on each. Sizes that are cut must divide, and cut between heads
where the model views features as heads. A bias is cut with its column, and added once after a row's sum.
"""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sandbox.comm import Axis, all_gather
from sandbox.errors import ConfigError
from sandbox.program import Program, replace_parameters
from sandbox.regions import Border, share_weights

__all__ = ["KINDS", "cut_modules"]

KINDS: dict[str, tuple[type[nn.Module], int | None]] = {
    "column": (nn.Linear, 0),
    "column, gathered": (nn.Linear, 0),
    "row": (nn.Linear, 1),
    "words": (nn.Embedding, 0),
    "shared": (nn.Module, None),
}
"""What a plan may say -> the kind of module, and the dimension of its weight that is cut."""


def cut_modules(program: Program, model: nn.Module, plan: Sequence[tuple[str, str]], axis: Axis) -> Program:
    """Return `program` with modules of `model` cut over `axis`. Raises ConfigError: the plan does not fit the model."""
    border, layout = Border(axis, sequence=False), dict(program.layout)
    chosen = _chosen(model, plan)
    new: dict[str, nn.Parameter] = {}
    for path, (module, kind) in chosen.items():
        for name, param in module.named_parameters(prefix=path, recurse=False):
            dim = KINDS[kind][1]
            if name not in layout or name in new or dim is None or (kind == "row" and name.endswith("bias")):
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
        _run_cut(module, kind, border)
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

    def row(x: Tensor) -> Tensor:
        out = border.leave(F.linear(x, module.weight))
        return out if module.bias is None else out + module.bias

    def words(tokens: Tensor) -> Tensor:
        first = axis.rank * module.weight.shape[0]
        elsewhere = (tokens < first) | (tokens >= first + module.weight.shape[0])
        rows = F.embedding((tokens - first).masked_fill(elsewhere, 0), module.weight)
        return border.leave(rows.masked_fill(elsewhere[..., None], 0.0))

    if kind == "shared":
        names = [name for name, _ in module.named_parameters()]
        owners = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        share_weights(module, owners, axis)
    else:
        module.forward = {"column": column, "column, gathered": gathered, "row": row, "words": words}[kind]


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
