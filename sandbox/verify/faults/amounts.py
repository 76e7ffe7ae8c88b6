"""Bugs that change no value: bytes sent, or held after a step, for which the strategy has no need."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sandbox import buckets
from sandbox.batch import IGNORED
from sandbox.buckets import Bucket
from sandbox.comm import Axis, Pending, all_gather, all_reduce
from sandbox.partition import even
from sandbox.trainer import Trainer
from sandbox.verify.faults.planting import at_once, change, fault, patch


@fault(70, "deepspeedai/DeepSpeed/issues/5758", "bytes", "zero2", 3)
def all_reduced_for_a_part(trainer: Trainer) -> None:
    """Gradients are all-reduced, and each rank takes its part of the sum."""

    def whole(flat: Tensor, sizes: list[int], axis: Axis, dtype: torch.dtype) -> Pending:
        total = all_reduce(flat.to(dtype), axis)

        def part() -> Tensor:
            parts: tuple[Tensor, ...] = total.wait().split(sizes)
            return parts[axis.rank].clone()

        return at_once(axis, part)

    patch(buckets, "reduce_scatter", whole)


@fault(71, "areal-project/AReaL/issues/664", "bytes", "tensor")
def logits_gathered(trainer: Trainer) -> None:
    """Every rank gathers the logits of all words and works out the whole loss."""
    axis = trainer.mesh.axis("tp")
    words = even(trainer.config.model.padded_vocab, axis.size)

    class Gathered(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            columns = logits.T
            sizes = [size * columns.shape[1] for size in words]
            flat = logits.new_empty(sum(sizes))
            flat.split(sizes)[axis.rank].view(columns.shape).copy_(columns)
            return all_gather(flat, sizes, axis).wait().view(-1, columns.shape[1]).T

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            parts: tuple[Tensor, ...] = grad.split(words, 1)
            return parts[axis.rank]

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        whole: Tensor = Gathered.apply(logits.flatten(0, 1))  # type: ignore[no-untyped-call]
        return F.cross_entropy(whole, targets.flatten(), ignore_index=IGNORED, reduction="sum")

    change(trainer, loss=loss)


@fault(72, "deepspeedai/DeepSpeed/pull/856", "memory", "zero2")
def reduced_gradients_not_cleared(trainer: Trainer) -> None:
    """Parameters keep their whole gradients after these are reduced, until the next backward."""
    collect, begin, reduce_grads = Bucket.collect, trainer.program.begin, trainer.program.reduce_grads
    kept: dict[str, Tensor | None] = {}

    def keep(bucket: Bucket, name: str) -> None:
        kept[name] = bucket.params[name].grad
        collect(bucket, name)

    def clear(final: bool) -> None:
        trainer.zero_grad()
        begin(final)

    def restore() -> None:
        reduce_grads()
        for name, param in trainer.program.model.named_parameters():
            param.grad = kept.pop(name, None)

    patch(Bucket, "collect", keep)
    change(trainer, begin=clear, reduce_grads=restore)
