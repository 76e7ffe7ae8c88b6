"""Bugs of the data axis: scale of the loss, synchronisation and accumulation; data and random numbers."""

from dataclasses import replace

import torch
from torch import Tensor

from sandbox import buckets
from sandbox.batch import Batch
from sandbox.buckets import Bucket, ScatterSum
from sandbox.comm import Axis, Pending, all_reduce
from sandbox.strategies import ddp
from sandbox.trainer import Trainer
from sandbox.verify.faults.planting import at_once, change, change_loss, fault, patch

# Loss and its scale


@fault(1, "huggingface/transformers/pull/34191", "weighting", "ddp")
def microbatch_mean_of_means(trainer: Trainer) -> None:
    """Each microbatch's loss is its own mean."""
    count = trainer.config.train.microbatches * trainer.config.mesh.dp.degree
    change_loss(trainer, lambda loss, batch, valid: loss / max(1, batch.valid) / count)


@fault(2, "huggingface/transformers/issues/34242", "weighting", "zero2")
def rank_mean_of_means(trainer: Trainer) -> None:
    """Each rank's loss is the mean over its own valid targets, then ranks are averaged."""
    shard, ranks = trainer.program.shard_batch, trainer.config.mesh.dp.degree
    change_loss(trainer, lambda loss, batch, valid: loss / shard(trainer.batch()).valid / ranks)


@fault(3, "huggingface/accelerate/issues/1839", "scale", "fsdp")
def divided_twice(trainer: Trainer) -> None:
    """The loss is divided by the number of microbatches once more."""
    change_loss(trainer, lambda loss, batch, valid: loss / valid / trainer.config.train.microbatches)


@fault(7, "huggingface/transformers/issues/39648", "scale", "zero1", 4)
def summed_for_averaged(trainer: Trainer) -> None:
    """The loss is scaled by the number of ranks for an average that is a sum."""
    change_loss(trainer, lambda loss, batch, valid: loss * trainer.config.mesh.world / valid)


@fault(29, "Lightning-AI/pytorch-lightning/issues/19987", "weighting", "ddp")
def last_microbatch_dropped(trainer: Trainer) -> None:
    """The last microbatch, a partial window, is never run."""
    inner = trainer.program.forward_backward
    change(trainer, forward_backward=lambda program, batches, valid: inner(program, batches[:-1], valid))


# Synchronisation and accumulation


@fault(24, "modelscope/FunASR/pull/3472", "reduction", "ddp")
def synchronised_one_microbatch_early(trainer: Trainer) -> None:
    """Gradients are reduced after the first microbatch instead of the last."""
    begin, seen = trainer.program.begin, [0]

    def early(final: bool) -> None:
        seen[0] += 1
        begin(seen[0] % trainer.config.train.microbatches == 1)

    change(trainer, begin=early)


@fault(27, "deepspeedai/DeepSpeed/pull/7985", "reduction", "ddp")
def last_microbatch_stays_local(trainer: Trainer) -> None:
    """What the last microbatch adds is added after the reduction, on each rank its own."""
    params = trainer.program.parameters
    early: dict[str, Tensor] = {}
    late: dict[str, Tensor] = {}
    begin, reduce_grads, collect = trainer.program.begin, trainer.program.reduce_grads, Bucket.collect

    def before(final: bool) -> None:
        begin(final)
        early.update({name: p.grad.clone() for name, p in params.items() if final and p.grad is not None})

    def only_early(bucket: Bucket, name: str) -> None:
        param = bucket.params[name]
        if param.grad is not None:
            late[name], param.grad = param.grad - early[name], early[name]
        collect(bucket, name)

    def after() -> None:
        reduce_grads()
        for name, grad in late.items():
            reduced = params[name].grad
            params[name].grad = grad if reduced is None else reduced + grad
        late.clear()

    patch(Bucket, "collect", only_early)
    change(trainer, begin=before, reduce_grads=after)


@fault(28, "ServiceNow/Fast-LLM/pull/551", "weighting", "zero2")
def accumulation_overwritten(trainer: Trainer) -> None:
    """Each microbatch's sum replaces that of the one before."""
    land = ScatterSum._land

    def overwrite(sums: ScatterSum) -> None:
        sums.sums.pop(sums._scatters[0][0], None)
        land(sums)

    patch(ScatterSum, "_land", overwrite)


@fault(30, "pytorch/pytorch/issues/98281", "reduction", "ddp", 3)
def parameter_outside_the_wrapper(trainer: Trainer) -> None:
    """The final norm was replaced after wrapping, so its gradient stays local."""
    collect, reduce_grads, own = Bucket.collect, trainer.program.reduce_grads, {}
    names = ("norm.weight", "norm.bias")

    def remember(bucket: Bucket, name: str) -> None:
        if name in names:
            own[name] = bucket.params[name].grad
        collect(bucket, name)

    def restore() -> None:
        reduce_grads()
        for name, grad in own.items():
            trainer.program.parameters[name].grad = grad

    patch(Bucket, "collect", remember)
    change(trainer, reduce_grads=restore)


@fault(31, "deepspeedai/DeepSpeed/issues/5545", "reduction", "zero2", train={"microbatches": 1})
def bucket_overwritten_under_way(trainer: Trainer) -> None:
    """The buffer of the second bucket is filled with the third before it has been sent."""
    launch, held = ScatterSum.launch, {}

    def late(sums: ScatterSum, number: int, flat: Tensor, sizes: list[int], final: bool) -> None:
        if number == 1:
            held[number] = (flat, sizes)
            return
        if held:
            own, own_sizes = held.pop(1)
            shared = min(own.numel(), flat.numel())
            own[:shared] = flat[:shared]
            launch(sums, 1, own, own_sizes, final)
        launch(sums, number, flat, sizes, final)

    patch(ScatterSum, "launch", late)


@fault(32, "facebookresearch/fairscale/issues/517", "reduction", "zero2", 4)
def last_bucket_not_flushed(trainer: Trainer) -> None:
    """The last, partly filled bucket is never reduced: each rank keeps its own gradient."""
    launch, last = ScatterSum.launch, len(_buckets(trainer)) - 1

    def skip(sums: ScatterSum, number: int, flat: Tensor, sizes: list[int], final: bool) -> None:
        if number < last:
            launch(sums, number, flat, sizes, final)
            return
        own = flat.split(sizes)[sums._shards[number].rank]
        sums.sums[number] = sums.sums[number] + own if number in sums.sums else own

    patch(ScatterSum, "launch", skip)


@fault(41, "pytorch/pytorch/issues/106395", "precision", "ddp", 4)
def reduced_in_bfloat16(trainer: Trainer) -> None:
    """Gradients travel, and are summed, in bfloat16."""
    exact = all_reduce

    def narrow(tensor: Tensor, axis: Axis) -> Pending:
        short = exact(tensor.bfloat16(), axis)
        return at_once(axis, lambda: tensor.copy_(short.wait()))

    patch(ddp, "all_reduce", narrow)


# Data, initial values, random numbers


@fault(43, "mehta-lab/VisCy/pull/408", "data", "ddp")
def same_rows_on_every_rank(trainer: Trainer) -> None:
    """The sampler believes that it is alone with rank 0."""
    size = trainer.mesh.data.size
    change(trainer, shard_batch=lambda batch: batch.split_rows(size)[0])


@fault(44, "NVlabs/LongLive/issues/71", "data", "fsdp")
def shuffled_differently_on_each_rank(trainer: Trainer) -> None:
    """The permutation's seed includes the rank."""
    corpus, train = trainer.corpus, trainer.config.train
    seed = train.seed + trainer.mesh.rank
    patch(trainer, "batch", lambda: corpus.batch(trainer.step, seed=seed, rows=train.batch))


@fault(45, "pytorch/torchtitan/issues/166", "initialisation", "ddp", 3)
def replicas_start_apart(trainer: Trainer) -> None:
    """Ranks draw their own initial values and nobody broadcasts."""
    with torch.no_grad():
        for param in trainer.program.parameters.values():
            param.mul_(1 + 0.01 * trainer.mesh.rank)


@fault(47, "huggingface/transformers/issues/31412", "forward", "zero3")
def dropout_differs_by_rank(trainer: Trainer) -> None:
    """Masks are drawn from a generator that the rank seeds."""
    shard = trainer.program.shard_batch
    change(trainer, shard_batch=lambda batch: replace(shard(batch), key=batch.key + trainer.mesh.rank))


@fault(59, "huggingface/accelerate/pull/4203", "data", "zero2")
def data_order_changes_on_resume(trainer: Trainer) -> None:
    """After the first step the loader starts again with a batch skipped."""
    corpus, train = trainer.corpus, trainer.config.train

    def later() -> Batch:
        return corpus.batch(trainer.step + (trainer.step > 0), seed=train.seed, rows=train.batch)

    patch(trainer, "batch", later)


def _buckets(trainer: Trainer) -> list[Bucket]:
    options = trainer.config.mesh.dp.options
    return buckets.cut_buckets(dict(trainer.program.model.named_parameters()), options["bucket_mb"])
