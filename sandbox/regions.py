"""Collectives that autograd can see: what a rank does in forward, and its adjoint in backward.

Between two regions of a model a tensor is whole on every rank, cut along a dimension, or a sum that is still to be
taken. `X_n` reads: cut over the ranks; `X{U}`: each rank holds a term of X. G is a gradient, of X or Y.

    function              forward                        backward
    linears               X -> Y_n                       G{U} -> G    all_reduce
    leave                 X{U} -> X    all_reduce        G -> G
    linears, `sequence`   X_n -> Y_n   all_gather        G{U} -> G_n  reduce_scatter, and all_gather of X_n again
    leave, `sequence`     X{U} -> X_n  reduce_scatter    G_n -> G     all_gather
    enter                 X -> X, X                      G, G'{U} -> G + G'    all_reduce
    enter, `sequence`     X_n -> X, X  all_gather        G, G'{U} -> G_n + G'  reduce_scatter
    share                 W -> W                         G{U} -> G    all_reduce, many small tensors as one
    vocabulary_loss       Y_n -> loss  all_gather        G -> G_n

Collectives want the ranks' parts end to end: columns of [B, S, D] cost one copy.

Sources: Shoeybi et al., "Megatron-LM", 2019 (f and g, and the overlap in `linears`); Korthikanti et al., "Reducing
Activation Recomputation in Large Transformer Models", MLSys 2023.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sandbox.batch import IGNORED
from sandbox.comm import Axis, all_gather, all_reduce, reduce_scatter
from sandbox.partition import even

__all__ = ["Border", "Weights", "share", "share_weights", "start_gather", "start_scatter", "vocabulary_loss"]

Weights = list[tuple[nn.Module, str]]
"""Parameters, as layer and name."""


@dataclass(frozen=True)
class Border:
    """Between what all ranks do alike, or each for its columns with `sequence`, and what each does for its features."""

    axis: Axis
    sequence: bool
    columns: list[int] = field(default_factory=list)  # of each rank

    def see(self, model: nn.Module, args: Any) -> None:
        """Before the model runs: how many columns its batch has."""
        self.columns[:] = even(len(args[0].columns), self.axis.size)

    def stay(self, module: nn.Module, args: Any) -> Any:
        """Before dropout between regions: the batch, cut by columns as its input is."""
        x, batch = args
        start = sum(self.columns[: self.axis.rank])
        return x, batch.take_columns(slice(start, start + x.shape[1]))

    def linears(self, x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Layers that are cut by output features, all of the same input: [..., D] -> [..., F_n] each.

        With `sequence` it is [B, S_n, D], and is gathered. In backward the sum over ranks of the input's gradient is
        under way while the weights' gradients are computed.
        """
        parameters = [p if p is None else p.to(x.dtype) for layer in layers for p in (layer.weight, layer.bias)]
        out: tuple[Tensor, ...] = _run(
            _Linears, x, tuple(self.columns) if self.sequence else None, self.axis, *parameters
        )
        return out

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` twice, [B, S, D]: for what all ranks do alike, and for what each does for its features."""
        out: tuple[Tensor, Tensor] = _run(_Enter, x, tuple(self.columns) if self.sequence else None, self.axis)
        return out

    def leave(self, x: Tensor) -> Tensor:
        """The sum over ranks of `x` [B, S, D], a term on each. Takes `x` over: it may be summed in place."""
        out: Tensor = _run(_Scatter, x, tuple(self.columns), self.axis) if self.sequence else _run(_Leave, x, self.axis)
        return out


def share(axis: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
    """`weights` that all ranks hold and each uses on a part: their gradients are summed, as one tensor, in backward.

    Inside autograd, so that whoever reduces gradients afterwards, and however often, sees whole ones.
    """
    out: tuple[Tensor, ...] = _run(_Share, axis, *weights)
    return out


def share_weights(within: nn.Module, weights: Weights, axis: Axis) -> None:
    """`share` parameters of modules inside `within`: (module, name) each, whenever `within` runs.

    While it runs, the shared tensor lies in the module's own dictionary, where it is found before the parameter, which
    keeps its name and may be swapped or freed between runs.
    """
    inner = within.forward

    def forward(*args: Any) -> Any:  # no hooks: whoever computes `within` again does this again
        params = [module.get_parameter(name) for module, name in weights]
        for (module, name), shared in zip(weights, share(axis, *params), strict=True):
            module.__dict__[name] = shared
        try:
            return inner(*args)
        finally:
            for module, name in weights:
                module.__dict__.pop(name)

    if weights and axis.size > 1:
        within.forward = forward


def vocabulary_loss(logits: Tensor, targets: Tensor, words: range, axis: Axis) -> Tensor:
    """Cross entropy summed over valid targets, [B, S, V_tp], [B, S] -> [], of logits for this rank's `words` only."""
    out: Tensor = _run(_VocabularyLoss, logits, targets, words, axis)
    return out


def start_gather(x: Tensor, sizes: Sequence[int], axis: Axis) -> Callable[[], Tensor]:
    """Start to put all ranks' columns together, [B, sizes[rank], D] -> [B, S, D]; call the result to wait for it."""
    rows, _, width = x.shape
    counts = [rows * size * width for size in sizes]
    flat = x.new_empty(sum(counts))
    flat.split(counts)[axis.rank].view(x.shape).copy_(x)
    pending = all_gather(flat, counts, axis)

    def wait() -> Tensor:
        parts = zip(pending.wait().split(counts), sizes, strict=True)
        return torch.cat([part.view(rows, size, width) for part, size in parts], 1)

    return wait


def start_scatter(x: Tensor, sizes: Sequence[int], axis: Axis) -> Callable[[], Tensor]:
    """Start to sum [B, S, D] over `axis`, in float32 at least; call the result for this rank's columns."""
    rows, _, width = x.shape
    counts = [rows * size * width for size in sizes]
    flat = torch.cat([part.flatten() for part in x.split(list(sizes), 1)])
    pending = reduce_scatter(flat, counts, axis, torch.promote_types(x.dtype, torch.float32))
    return lambda: pending.wait().to(x.dtype).view(rows, -1, width)


def _run(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: tuple[int, ...] | None, axis: Axis, *weights_and_biases: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = cast("Sequence[Tensor]", weights_and_biases[::2]), weights_and_biases[1::2]
        ctx.sizes, ctx.axis, ctx.biased = sizes, axis, [bias is not None for bias in biases]
        ctx.save_for_backward(x, *weights)  # this rank's columns only, if they are cut: gathered again in backward
        whole = x if sizes is None else start_gather(x, sizes, axis)()
        return tuple(F.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gather = None if ctx.sizes is None else start_gather(x, ctx.sizes, ctx.axis)
        inner = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            inner += grad @ weight
        total = start_scatter(inner, ctx.sizes, ctx.axis) if gather else all_reduce(inner, ctx.axis).wait
        tokens = (gather() if gather else x).flatten(0, -2)  # and while the sum is under way:
        of_parameters: list[Tensor | None] = []
        for grad, biased in zip(grads, ctx.biased, strict=True):
            rows = grad.flatten(0, -2)
            of_parameters += [rows.T @ tokens, rows.sum(0) if biased else None]
        return total(), None, None, *of_parameters


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...] | None, axis: Axis) -> tuple[Tensor, Tensor]:
        ctx.cut = sizes, axis
        whole = x if sizes is None else start_gather(x, sizes, axis)()
        return whole.view_as(whole), whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, alike: Tensor, own: Tensor) -> tuple[Tensor, None, None]:
        sizes, axis = ctx.cut
        if sizes is None:
            return all_reduce(own.clone(memory_format=torch.contiguous_format), axis).wait().add_(alike), None, None
        return start_scatter(own, sizes, axis)().add_(alike.split(list(sizes), 1)[axis.rank]), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.mark_dirty(x)
        return all_reduce(x, axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.cut = sizes, axis
        return start_scatter(x, sizes, axis)()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return start_gather(grad, *ctx.cut)(), None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.dtypes = axis, [weight.dtype for weight in weights]
        wide = [torch.promote_types(dtype, torch.float32) for dtype in ctx.dtypes]
        return tuple(w.to(t) if w.dtype != t else w.view_as(w) for w, t in zip(weights, wide, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = all_reduce(torch.cat([grad.flatten() for grad in grads]), ctx.axis).wait()
        parts = flat.split([grad.numel() for grad in grads])
        whole = (p.view_as(g).to(t) for p, g, t in zip(parts, grads, ctx.dtypes, strict=True))
        return None, *whole


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, words: range, axis: Axis) -> Tensor:
        here = (targets >= words.start) & (targets < words.stop)
        index = (targets - words.start).masked_fill(~here, 0)[..., None]
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        terms = scores.new_empty(axis.size, 2, *targets.shape)
        terms[axis.rank, 0] = scores.logsumexp(-1)
        terms[axis.rank, 1] = scores.gather(-1, index)[..., 0].masked_fill(~here, 0.0)
        all_gather(terms.view(-1), [terms[0].numel()] * axis.size, axis).wait()
        total = terms[:, 0].logsumexp(0)
        ctx.save_for_backward(logits, total, index, here, valid := targets != IGNORED)
        return (total - terms[:, 1].sum(0)).masked_fill(~valid, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, total, index, here, valid = ctx.saved_tensors
        probabilities = (logits.to(total.dtype) - total[..., None]).exp_()
        probabilities.scatter_add_(-1, index, -here[..., None].to(total.dtype))
        return probabilities.mul_((grad * valid)[..., None]).to(logits.dtype), None, None, None
