"""What launched ranks do in test_recompute.py and test_precision.py. Imports of pytest stay outside."""

from collections.abc import Callable
from typing import Any

import torch
import world
from torch import Tensor

from sandbox.buckets import Bucket
from sandbox.config import Config
from sandbox.mail import Mail
from sandbox.measure import Peak
from sandbox.runtime import Member
from sandbox.strategies.pipeline import Pipeline
from sandbox.trainer import Trainer

Prepare = Callable[[Trainer], Any]


def peak(member: Member, config: Config) -> int:
    """The most bytes of activations and gradients under way that were alive in the second step."""
    trainer = world.trainer_of(member, config)
    trainer.train_step()
    with Peak(trainer.program, trainer.optimizer, by_kind=True) as most:
        trainer.compute_gradients(trainer.batch())
    return most.kinds["other"]


def peaks(member: Member, configs: list[Config]) -> list[int]:
    """`peak` of each."""
    return [peak(member, config) for config in configs]


def kept(member: Member, config: Config) -> int:
    """Bytes that autograd keeps between forward and backward of one microbatch, parameters not counted."""
    trainer = world.trainer_of(member, config)
    params = {p.untyped_storage().data_ptr() for p in trainer.program.model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = trainer.program.shard_batch(trainer.batch())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = trainer.program.model.train()(batch)
    assert logits.requires_grad
    return sum(saved.values())


def reduced(member: Member, config: Config, prepare: Prepare | None = None) -> list[tuple[str, int, float]]:
    """Of each flat gradient of a step that is reduced: dtype, elements, and the part that bfloat16 cannot hold."""
    trainer, found = world.trainer_of(member, config), []
    if prepare:
        prepare(trainer)
    take = Bucket.take

    def note(bucket: Bucket) -> Tensor:
        flat = take(bucket)
        some = flat[flat != 0]
        beyond = (some.bfloat16().to(some.dtype) != some).double().mean().item()
        found.append((str(flat.dtype), flat.numel(), beyond))
        return flat

    Bucket.take = note  # type: ignore[method-assign]
    trainer.compute_gradients(trainer.batch())
    return found


def add_up_in_the_dtype_of_compute(trainer: Trainer) -> None:
    """What is mended: gradients are as narrow as the parameters that were gathered."""
    for param in trainer.program.model.parameters():
        param.grad_dtype = None  # whatever comes


def waiting(member: Member, config: Config) -> tuple[int, int]:
    """The most messages of this rank that were not yet let go in a step, and how many it sent."""
    trainer = world.trainer_of(member, config)
    pipeline = trainer.program.forward_backward.__self__  # type: ignore[attr-defined]
    assert isinstance(pipeline, Pipeline)
    hand, most, sent = Mail.hand, 0, 0

    def count(mail: Mail, *args: Any) -> None:
        nonlocal most, sent
        before = len(mail._sent)
        hand(mail, *args)
        sent += len(mail._sent) - before
        most = max(most, len(mail._sent))

    Mail.hand = count  # type: ignore[method-assign]
    trainer.train_step()
    assert not pipeline.mail._sent
    return most, sent
