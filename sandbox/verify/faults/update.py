"""Bugs of the data axis between gradients and the next step: clipping, the optimizer, and what they leave behind."""

from dataclasses import replace

from torch import Tensor

import sandbox.trainer
from sandbox import units
from sandbox.program import Program, learning_rate, make_optimizer
from sandbox.trainer import Trainer
from sandbox.verify.faults.planting import change, clip_by_own_norm, fault, patch


@fault(33, "sgl-project/SpecForge/pull/663", "norm", "zero2", 4)
def clipped_by_the_local_norm(trainer: Trainer) -> None:
    """Each rank clips by the norm of what it holds."""
    clip_by_own_norm(trainer)


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
