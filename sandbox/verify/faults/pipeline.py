"""Bugs of pipeline parallelism, planted in the schedule, the tied weight and the end of a step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.mail import Mail
from sandbox.orders import Action
from sandbox.program import Program
from sandbox.stages import completed
from sandbox.strategies import pipeline
from sandbox.trainer import Trainer
from sandbox.verify.faults.planting import change, fault, patch
from sandbox.verify.matrix import TIED

TWO_OF_EACH_STAGE = {"dp": {"degree": 2, "strategy": "ddp"}}


@fault(4, "pytorch/torchtitan/issues/2972", "scale", "pipeline")
def normalised_after_backward(trainer: Trainer) -> None:
    """Each loss is a sum when backward starts, and only what is logged is divided by the valid targets."""
    inner = trainer.program.forward_backward

    def forward_backward(program: Program, batches: list[Batch], valid: float) -> Tensor:
        return inner(program, batches, 1) / valid

    change(trainer, forward_backward=forward_backward)


@fault(5, "pytorch/torchtitan/issues/1733", "weighting", "pipeline", 4)
def rescaled_with_every_accumulation(trainer: Trainer) -> None:
    """Whenever a microbatch's gradient is added, the sum of those before it is divided by their number once more."""
    backward = pipeline.Pipeline._backward

    def rescale(self: pipeline.Pipeline, action: Action) -> None:
        for param in self._views[action.stage].parameters():
            if param.grad is not None:
                param.grad /= trainer.config.train.microbatches
        backward(self, action)

    patch(pipeline.Pipeline, "_backward", rescale)


@fault(23, "uw-syfi/piper/issues/13", "reduction", "pipeline", model=TIED)
def tied_gradient_not_summed(trainer: Trainer) -> None:
    """The first rank steps the tied weight by the embedding's gradient, the last by the head's."""
    patch(Mail, "add_gradients", lambda mail, param, holders: None)


@fault(26, "meta-pytorch/torchrec/pull/4758", "reduction", "pipeline", beside=TWO_OF_EACH_STAGE)
def reduced_after_the_last_forward(trainer: Trainer) -> None:
    """Reduction starts in the backward pass after the last forward one; what later ones add stays on each rank."""
    reduce_grads = trainer.program.reduce_grads
    rank, ranks = trainer.mesh.axis("pp").rank, trainer.mesh.axis("pp").size
    params = trainer.program.parameters

    def too_early(model: nn.Module, used: Sequence[nn.Module], besides: str | None) -> dict[int, list[str]]:
        last = len(used) - (ranks - rank)  # 1F1B ends with as many backward passes as ranks follow, and one
        names = [name for some in completed(model, used, besides).values() for name in some]
        return {number: names if number == last else [] for number in range(len(used))}

    def reduce_before_all_is_there() -> None:
        late = {name: p.grad for name, p in params.items() if p.grad is not None}
        reduce_grads()
        for name, grad in late.items():
            reduced = params[name].grad
            params[name].grad = grad if reduced is None else torch.add(reduced, grad)

    patch(pipeline, "completed", too_early)
    change(trainer, reduce_grads=reduce_before_all_is_there)
