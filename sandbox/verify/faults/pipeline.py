"""Bugs of pipeline parallelism, planted in the schedule, the tied weight and the end of a step."""

from dataclasses import replace

import torch
from torch import Tensor

import sandbox.program
from sandbox.batch import Batch
from sandbox.mail import Mail
from sandbox.orders import Action
from sandbox.program import Program
from sandbox.stages import WeightsLater
from sandbox.strategies import pipeline
from sandbox.trainer import Trainer
from sandbox.verify.cases import TIED
from sandbox.verify.faults.planting import change, clip_by_own_norm, fault, patch


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


@fault(28, "NVIDIA-NeMo/Automodel/pull/3530", "weighting", "pipeline")
def only_the_last_microbatch_kept(trainer: Trainer) -> None:
    """Each backward pass of a stage overwrites what those before it left."""
    backward = pipeline.Pipeline._backward

    def overwrite(self: pipeline.Pipeline, action: Action) -> None:
        for param in self._views[action.stage].parameters():
            param.grad = None
        backward(self, action)

    patch(pipeline.Pipeline, "_backward", overwrite)


@fault(31, "deepspeedai/DeepSpeed/issues/2800", "backward", "pipeline", 4)
def gradient_sent_from_a_reused_buffer(trainer: Trainer) -> None:
    """What the last stage sends back of the second microbatch is, in the same buffer, still that of the first."""
    hand, held = Mail.hand, {}

    def stale(mail: Mail, action: Action, tensor: Tensor) -> None:
        if action.kind == "B" and action.stage == 2:
            held[action.microbatch] = tensor
            tensor = held[0] if action.microbatch == 1 else tensor
        hand(mail, action, tensor)

    patch(Mail, "hand", stale)


@fault(33, "pytorch/torchtitan/issues/596", "norm", "pipeline")
def stages_clipped_by_their_own_norms(trainer: Trainer) -> None:
    """Each rank clips by the norm of its own stages."""
    clip_by_own_norm(trainer)


@fault(34, "NVIDIA/Megatron-LM/pull/7228", "norm", "pipeline", model=TIED)
def tied_weight_counted_on_both_ends(trainer: Trainer) -> None:
    """The weight that first and last rank share counts twice in the norm."""
    counts = sandbox.program._counts
    patch(sandbox.program, "_counts", lambda layout, first: counts(replace(layout, copy=0), first))


@fault(46, "Modalities/modalities/pull/426", "initialisation", "pipeline")
def stages_start_alike(trainer: Trainer) -> None:
    """Every rank draws the first values of its blocks from the same seed, counting blocks from 0."""
    program = trainer.program
    own = [name.split(".")[1] for name in program.parameters if name.startswith("blocks.")]
    with torch.no_grad():
        for name, param in program.parameters.items():
            param.copy_(program.initial(name.replace(f"blocks.{own[0]}.", "blocks.0.")))


@fault(63, "deepspeedai/Megatron-DeepSpeed/issues/442", "backward", "pipeline", options={"schedule": "zb_h1"})
def weights_part_never_run(trainer: Trainer) -> None:
    """Gradients of matrices are put off, and nobody computes them."""
    patch(WeightsLater, "run", lambda later: later._late.clear())


@fault(64, "NVIDIA/Megatron-LM/pull/5271", "forward", "pipeline")
def microbatches_crossed_on_the_way(trainer: Trainer) -> None:
    """The hidden states of two microbatches arrive in each other's place."""
    hand = Mail.hand

    def crossed(mail: Mail, action: Action, tensor: Tensor) -> None:
        other = {0: 1, 1: 0}.get(action.microbatch, action.microbatch)
        hand(mail, action._replace(microbatch=other) if action.kind == "F" else action, tensor)

    patch(Mail, "hand", crossed)


@fault(64, "deepspeedai/DeepSpeed/issues/5729", "forward", "pipeline", train={"batch": 27})
def targets_of_another_microbatch(trainer: Trainer) -> None:
    """The last stage has read on in its data by the time when hidden states arrive: targets are the next ones."""
    inner, axis = trainer.program.forward_backward, trainer.mesh.axis("pp")

    def forward_backward(program: Program, batches: list[Batch], valid: float) -> Tensor:
        if axis.rank == axis.size - 1:
            following = batches[1:] + batches[:1]
            batches = [replace(b, targets=other.targets) for b, other in zip(batches, following, strict=True)]
        return inner(program, batches, valid)

    change(trainer, forward_backward=forward_backward)
