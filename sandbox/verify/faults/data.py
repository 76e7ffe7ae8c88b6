"""Bugs of the data axis: scale of the loss, synchronisation, norm and optimizer, data and random numbers."""

from dataclasses import replace

import torch
from torch import Tensor

import sandbox.trainer
from sandbox import buckets, units
from sandbox.batch import Batch
from sandbox.buckets import Bucket, ScatterSum
from sandbox.comm import Axis, Event, Pending, all_reduce
from sandbox.program import Program, learning_rate, make_optimizer
from sandbox.strategies import ddp
from sandbox.trainer import Trainer
from sandbox.verify.faults.planting import change, change_loss, fault, patch

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
        own = flat.split(sizes)[sums._shard.rank]
        sums.sums[number] = sums.sums[number] + own if number in sums.sums else own

    patch(ScatterSum, "launch", skip)


@fault(41, "pytorch/pytorch/issues/106395", "precision", "ddp", 4)
def reduced_in_bfloat16(trainer: Trainer) -> None:
    """Gradients travel, and are summed, in bfloat16."""
    exact = all_reduce

    def narrow(tensor: Tensor, axis: Axis) -> Pending:
        short = exact(tensor.bfloat16(), axis)
        return Pending(axis, Event(0, "", "", 0, 0.0), (), lambda: tensor.copy_(short.wait()))

    patch(ddp, "all_reduce", narrow)


# Norm and optimizer


@fault(33, "sgl-project/SpecForge/pull/663", "norm", "zero2", 4)
def clipped_by_the_local_norm(trainer: Trainer) -> None:
    """Each rank clips by the norm of what it holds."""

    def local(program: Program, most: float | None) -> Tensor:
        norm: Tensor = torch.nn.utils.clip_grad_norm_(program.parameters.values(), most or 1e9, foreach=True)
        return norm.double()

    change(trainer, clip=local)


@fault(34, "NVIDIA-NeMo/RL/pull/3788", "norm", "fsdp", 4, options={"replicas": 2})
def replicas_counted_in_the_norm(trainer: Trainer) -> None:
    """Every rank counts all that it holds, so replicas count twice."""
    clip, factor = trainer.program.clip, trainer.config.mesh.dp.replicas**0.5

    def overcount(program: Program, most: float | None) -> Tensor:
        norm: Tensor = factor * clip(program, None if most is None else most / factor)
        return norm

    change(trainer, clip=overcount)


@fault(36, "deepspeedai/DeepSpeed/pull/2058", "optimizer", "zero1", 3)
def partition_copied_back_misaligned(trainer: Trainer) -> None:
    """New parameters are gathered with parts of floor(N / n) elements where they were cut with ceil(N / n)."""
    refresh = trainer.program.refresh

    def misaligned() -> None:
        refresh()
        for param in trainer.program.model.parameters():
            param.data.view(-1)[1:] = param.data.view(-1)[:-1].clone()

    change(trainer, refresh=misaligned)


@fault(37, "pytorch/pytorch/issues/149205", "state", "zero3", 3)
def gathered_from_a_stale_copy(trainer: Trainer) -> None:
    """Parameters are gathered from a copy made at the start, which steps do not reach."""
    start = units.Shard.start
    copies: dict[int, Tensor] = {}

    def stale(shard: units.Shard) -> None:
        now = shard.part
        shard.part = copies.setdefault(id(shard), now.clone())
        start(shard)
        shard.part = now

    patch(units.Shard, "start", stale)


@fault(39, "pytorch/pytorch/issues/101343", "optimizer", "zero1", 3)
def decay_lost_by_flattening(trainer: Trainer) -> None:
    """Who decays is decided by the dimensions of the flat piece, so nobody does."""
    program = trainer.program
    shapes = {name: replace(program.layout[name], shape=tuple(p.shape)) for name, p in program.parameters.items()}
    trainer.optimizer = make_optimizer(replace(program, layout=shapes))


@fault(40, "huggingface/accelerate/issues/2926", "learning rate", "ddp", 3)
def schedule_steps_once_a_rank(trainer: Trainer) -> None:
    """The learning rate's clock ticks once for every rank."""
    world = trainer.config.mesh.world
    patch(sandbox.trainer, "learning_rate", lambda train, step: learning_rate(train, step * world))


@fault(42, "NVIDIA-NeMo/Automodel/pull/2995", "optimizer", "ddp", 3)
def unused_parameter_not_stepped(trainer: Trainer) -> None:
    """One rank takes a parameter for unused and skips its step: no decay, no momentum."""
    if trainer.mesh.rank == 1:
        for group in trainer.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not trainer.program.parameters["head.weight"]]


@fault(57, "KempnerInstitute/KempnerForge/pull/115", "state", "zero1")
def momentum_dropped_on_resume(trainer: Trainer) -> None:
    """After the first step the optimizer starts anew, as when a checkpoint's moments are not loaded."""
    update = trainer.update

    def forgetful() -> Tensor:
        norm = update()
        if trainer.step == 1:
            trainer.optimizer.state.clear()
        return norm

    patch(trainer, "update", forgetful)


@fault(61, "deepspeedai/DeepSpeed/pull/7839", "state", "ddp")
def gradients_not_zeroed(trainer: Trainer) -> None:
    """What a step leaves in .grad is added to the next."""
    patch(trainer, "zero_grad", lambda: None)


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
