"""Bugs in how a library's own implementation is used, planted where it leaves the right use to its user."""

from typing import Any

from sandbox.engines.torch import pipeline
from sandbox.trainer import Trainer
from sandbox.verify.cases import MODEL, TIED
from sandbox.verify.faults.planting import change, fault, patch

SEQUENCE = {"sequence": True}


@fault(5, "pytorch/pytorch/pull/144352", "scale", "pipeline", engine="torch")
def scaled_as_for_a_mean(trainer: Trainer) -> None:
    """Torch's schedule divides gradients by the number of microbatches, its default, though the loss is a sum."""
    make = pipeline.Pipeline._schedule

    def scaling(self: pipeline.Pipeline, microbatches: int, training: bool) -> Any:
        schedule = make(self, microbatches, training)
        schedule.scale_grads = True
        return schedule

    patch(pipeline.Pipeline, "_schedule", scaling)


@fault(10, "NVIDIA/TransformerEngine/issues/441", "reduction", "tensor", engine="torch", options=SEQUENCE, model=MODEL)
def partial_dtensors_not_reduced(trainer: Trainer) -> None:
    """Gradients of norms stay what DTensor's backward leaves: each rank's partial sum over its own columns or heads."""
    inner, parameters = trainer.program.reduce_grads, trainer.program.parameters

    def reduce_grads() -> None:
        partial = {name: p.grad for name, p in parameters.items() if any(at.is_partial() for at in _placements(p.grad))}
        inner()
        for name, grad in partial.items():
            parameters[name].grad = grad

    change(trainer, reduce_grads=reduce_grads)


@fault(23, "pytorch/pytorch/issues/51931", "reduction", "pipeline", engine="torch", model=TIED)
def tied_gradient_left_to_torch(trainer: Trainer) -> None:
    """The first rank steps the tied weight by the embedding's gradient, the last by the head's: no stage knows both."""
    patch(pipeline, "add_gradients", lambda param, axis, other: None)


def _placements(tensor: Any) -> Any:
    return getattr(tensor, "placements", ())
