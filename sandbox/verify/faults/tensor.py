"""Bugs of tensor parallelism, planted where sums over its axis are taken, twice, or not at all."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox.program
from sandbox import regions
from sandbox.batch import Batch
from sandbox.comm import Axis, Pending, all_gather, all_reduce
from sandbox.config import Model
from sandbox.model import Block, Transformer, dropout
from sandbox.model.attention import attend
from sandbox.partition import own
from sandbox.regions import share_weights, start_gather, start_scatter
from sandbox.strategies.tensor import halves
from sandbox.trainer import Trainer
from sandbox.verify.faults.planting import at_once, change, clip_by_own_norm, fault, patch

SEQUENCE = {"sequence": True}
BIASED = Model(layers=2, width=24, heads=4, kv_heads=2, hidden=36, norm="layer", mlp="gelu", bias=True, qk_norm=True)
GROUPED = Model(layers=2, width=32, heads=8, kv_heads=4, norm="layer", bias=True)


@fault(10, "NVIDIA/Megatron-LM/issues/1446", "reduction", "tensor", options=SEQUENCE, model=BIASED)
def norms_of_own_columns_not_summed(trainer: Trainer) -> None:
    """Each rank keeps the gradient of the norms that its own columns give."""
    _share_otherwise(trainer, lambda name: ".norm" in name, lambda own, shared, ranks: own)


@fault(11, "EleutherAI/gpt-neox/pull/1259", "reduction", "tensor", options=SEQUENCE, model=BIASED)
def norms_of_own_columns_averaged(trainer: Trainer) -> None:
    """Gradients of norms and of row biases are averaged over tp; all ranks agree."""
    _share_otherwise(trainer, lambda name: True, lambda own, shared, ranks: _scale_gradient(shared, 1 / ranks))


@fault(12, "NVIDIA-NeMo/RL/issues/3716", "reduction", "tensor", model=BIASED)
def query_and_key_norms_not_summed(trainer: Trainer) -> None:
    """Each rank keeps the gradient of the query and key norms that its own heads give."""
    _share_otherwise(trainer, lambda name: "_norm" in name, lambda own, shared, ranks: own)


@fault(13, "bigcode-project/Megatron-LM/pull/12", "reduction", "tensor", 4, model=BIASED)
def shared_keys_not_summed(trainer: Trainer) -> None:
    """Ranks that hold the same key/value head keep the gradient that their own queries give."""
    _share_otherwise(trainer, lambda name: ".k." in name or ".v." in name, lambda own, shared, ranks: own)


@fault(15, "pytorch/torchtitan/pull/3412", "reduction", "tensor", 3, model=BIASED)
def gradient_below_the_head_not_summed(trainer: Trainer) -> None:
    """The gradient of the head's input is the one of this rank's words."""
    head = _model(trainer).head
    assert head is not None
    patch(head, "forward", lambda x: F.linear(x, head.weight))


@fault(16, "inclusionAI/AReno/pull/496", "reduction", "tensor", model=BIASED)
def norms_summed_twice(trainer: Trainer) -> None:
    """Norms before a cut matrix are summed over tp, although their input's gradient already was."""
    for block in _blocks(trainer):
        for norm in (block.norm1, block.norm2):
            share_weights(norm, [(norm, name) for name, _ in norm.named_parameters()], trainer.mesh.axis("tp"))


@fault(17, "huggingface/nanotron/pull/172", "backward", "tensor", options=SEQUENCE, model=BIASED)
def gradients_gathered_after_the_product(trainer: Trainer) -> None:
    """Backward of o and down multiplies by this rank's weights, then gathers what belongs to other ranks' weights."""
    axis = trainer.mesh.axis("tp")

    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
            ctx.save_for_backward(x, weight)
            ctx.sizes = sizes
            return start_scatter(F.linear(x, weight), sizes, axis)()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, weight = ctx.saved_tensors
            whole = start_gather(grad, ctx.sizes, axis)()
            return start_gather(grad @ weight, ctx.sizes, axis)(), whole.flatten(0, 1).T @ x.flatten(0, 1), None

    def rows(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            sizes = [len(own(x.shape[1], axis.size, rank)) for rank in range(axis.size)]
            out: Tensor = Rows.apply(x, linear.weight, sizes)  # type: ignore[no-untyped-call]
            return out + linear.bias

        return forward

    for linear in _rows(trainer):
        patch(linear, "forward", rows(linear))


@fault(18, "PaddlePaddle/Paddle/pull/35186", "forward", "tensor", model=BIASED)
def row_bias_added_by_each_rank(trainer: Trainer) -> None:
    """The bias of o and down is part of what is summed, so it is added once a rank."""
    _bias_before_the_sum(trainer, lambda bias, ranks: bias)


@fault(19, "pytorch/torchtitan/pull/4332", "reduction", "tensor", model=BIASED)
def row_bias_divided_before_the_sum(trainer: Trainer) -> None:
    """Each rank adds its part of the bias of o and down, so each has only that part of its gradient."""
    _bias_before_the_sum(trainer, lambda bias, ranks: bias / ranks)


@fault(20, "modelscope/ms-swift/pull/9947", "weighting", "tensor", model=BIASED)
def losses_summed_outside_of_autograd(trainer: Trainer) -> None:
    """The rank that has the target works out the loss; the others add it by a sum that autograd does not see."""
    axis, vocabulary = trainer.mesh.axis("tp"), trainer.config.model.padded_vocab
    words = own(vocabulary, axis.size, axis.rank)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        mine = logits.logsumexp(-1)
        others = all_reduce(mine.detach().exp(), axis).wait() - mine.detach().exp()
        here = (targets >= words.start) & (targets < words.stop)
        target = logits.gather(-1, (targets - words.start).masked_fill(~here, 0)[..., None])[..., 0]
        own_loss = ((mine.exp() + others).log() - target).masked_fill(~here, 0.0).sum()
        return own_loss + (all_reduce(own_loss.detach().clone(), axis).wait() - own_loss.detach())

    change(trainer, loss=loss)


@fault(21, "NVIDIA/Megatron-LM/issues/7452", "forward", "tensor", model=BIASED)
def exponentials_summed_twice(trainer: Trainer) -> None:
    """The sum of exponentials over the whole vocabulary is summed over ranks once more: log(tp) in the loss."""

    def again(flat: Tensor, sizes: list[int], axis: Axis) -> Pending:
        pending = all_gather(flat, sizes, axis)

        def finish() -> Tensor:
            pending.wait().view(axis.size, 2, -1)[:, 0] += math.log(axis.size)
            return flat

        return at_once(axis, finish)

    patch(regions, "all_gather", again)


@fault(21, "NVIDIA/Megatron-LM/issues/737", "forward", "tensor", model=BIASED)
def softmax_over_own_words(trainer: Trainer) -> None:
    """Each rank takes its own words for the whole vocabulary when it sums the exponentials."""

    def own_only(flat: Tensor, sizes: list[int], axis: Axis) -> Pending:
        pending = all_gather(flat, sizes, axis)

        def finish() -> Tensor:
            sums = pending.wait().view(axis.size, 2, -1)[:, 0]
            sums[[rank for rank in range(axis.size) if rank != axis.rank]] = -torch.inf
            return flat

        return at_once(axis, finish)

    patch(regions, "all_gather", own_only)


@fault(33, "bigscience-workshop/Megatron-DeepSpeed/pull/274", "norm", "tensor", model=BIASED)
def parts_clipped_by_their_own_norms(trainer: Trainer) -> None:
    """Each rank clips by the norm of its parts of the matrices, so norms drift apart."""
    clip_by_own_norm(trainer)


@fault(34, "ROCm/TransformerEngine/pull/715", "norm", "tensor", model=BIASED)
def replicated_norms_counted_by_each_rank(trainer: Trainer) -> None:
    """Weights that all ranks of tp hold are taken for parts, so they count in the norm once a rank."""
    patch(sandbox.program, "_counts", lambda layout, first: True)


@fault(35, "NVIDIA/Megatron-LM/pull/5916", "norm", "tensor", model=BIASED)
def cut_biases_counted_on_one_rank(trainer: Trainer) -> None:
    """Biases that are cut lack the mark of a part, so only those of the first rank of tp count in the norm."""
    counts = sandbox.program._counts
    patch(
        sandbox.program,
        "_counts",
        lambda layout, first: counts(layout, first) and (len(layout.shape) > 1 or first["tp"]),
    )


@fault(45, "NVIDIA-NeMo/Automodel/pull/3822", "initialisation", "tensor", model=BIASED)
def replicated_norms_start_apart(trainer: Trainer) -> None:
    """Ranks of tp draw the first values of what they all hold by themselves, and nobody broadcasts."""
    with torch.no_grad():
        for name, param in trainer.program.parameters.items():
            if "tp" not in trainer.program.layout[name].sharded:
                param.mul_(1 + 0.01 * trainer.mesh.axis("tp").rank)


@fault(46, "modelscope/ms-swift/pull/7944", "initialisation", "tensor", model=BIASED)
def parts_start_alike(trainer: Trainer) -> None:
    """Every rank of tp draws the first values of its parts from the same seed, so all parts are the first one."""
    program = trainer.program
    with torch.no_grad():
        for name, param in program.parameters.items():
            first = replace(program.layout[name], offset=(0,) * param.dim())
            param.copy_(first.take(program.initial(name)))


@fault(47, "bigscience-workshop/Megatron-DeepSpeed/pull/276", "forward", "tensor")
def one_rank_draws_once_more(trainer: Trainer) -> None:
    """The rank that reads the data takes a random number more: masks of dropout differ where all ranks hold all."""
    kept, extra = dropout.kept, int(trainer.mesh.axis("tp").rank == 0)
    patch(dropout, "kept", lambda batch, *where: kept(replace(batch, key=batch.key + extra), *where))


@fault(47, "NVIDIA/Megatron-LM/issues/1256", "forward", "tensor", options=SEQUENCE)
def parts_of_columns_drop_alike(trainer: Trainer) -> None:
    """Outside attention and MLP each rank draws for its own columns as if they were the first."""
    kept = dropout.kept

    def from_the_first(batch: Batch, *where: Any) -> Tensor:
        return kept(replace(batch, columns=batch.columns - batch.columns[0]), *where)

    patch(dropout, "kept", from_the_first)


@fault(66, "apple/axlearn/pull/842", "forward", "tensor", model=GROUPED)
def keys_tiled_over_queries(trainer: Trainer) -> None:
    """A rank's key heads are repeated as a whole, 0 1 0 1, where neighbouring queries share one: 0 0 1 1."""

    def tiled(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        times = q.shape[1] // k.shape[1]
        return attend(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), batch)

    for block in _blocks(trainer):
        block.attention.core = tiled


def _share_otherwise(
    trainer: Trainer, which: Callable[[str], bool], how: Callable[[Tensor, Tensor, int], Tensor]
) -> None:
    """Give layers `how(own, shared, ranks)` for the parameters of `which` names, instead of the shared tensor."""
    share = regions.share
    chosen = {id(p) for name, p in trainer.program.model.named_parameters() if which(name)}

    def otherwise(axis: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
        shared = share(axis, *weights)
        pairs = zip(weights, shared, strict=True)
        return tuple(how(own, s, axis.size) if id(own) in chosen else s for own, s in pairs)

    patch(regions, "share", otherwise)


def _scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    tensor.register_hook(lambda grad: grad * factor)
    return tensor


def _bias_before_the_sum(trainer: Trainer, part: Callable[[Tensor, int], Tensor]) -> None:
    border = regions.Border(trainer.mesh.axis("tp"), sequence=False)

    def rows(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: border.leave(F.linear(x, linear.weight, part(linear.bias, border.axis.size)))

    for linear in _rows(trainer):
        patch(linear, "forward", rows(linear))


def _rows(trainer: Trainer) -> Iterable[nn.Linear]:
    return (linear for block in _blocks(trainer) for _, linear in halves(block))


def _blocks(trainer: Trainer) -> Iterable[Block]:
    return cast("Iterable[Block]", _model(trainer).blocks.values())


def _model(trainer: Trainer) -> Transformer:
    return cast(Transformer, trainer.program.model)
