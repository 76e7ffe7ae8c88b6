"""Accelerate's tensor parallelism: `ParallelismConfig(tp_size)`, for a model that torch has cut into DTensors.

    tensor                       before        in use         style
    q, k, v, gate, up W, b       W[F_tp, D]    -              ColwiseParallel: of a whole input, some features
    o, down           W          W[D, F_tp]    -              RowwiseParallel: of some features, a term of the sum
    embedding, head   W          W[V_tp, D]    -              some words
    hidden state      X          X[B, S, D]    -              with `sequence`, X[B, S_tp, D] outside the regions

Accelerate cuts nothing itself: it wants a model with DTensors in it, such as transformers makes by the `tp_plan` of a
model of its own. Here engine torch cuts, by `parallelize_module`, and tells the rest (engines/torch/tensor.py): what is
not in this table, what need not divide, and the bytes sent, which are the same to the byte. Accelerate's are the loop,
its division of the loss by the number of microbatches, the clipping and the optimizer around torch's.

Source: Accelerate 1.15; Shoeybi et al., "Megatron-LM", 2019.
"""

from dataclasses import replace

from torch import nn

from sandbox.config import Config
from sandbox.engines.accelerate._accelerator import (
    accumulate,
    clip_with,
    forget_launcher,
    make_accelerator,
    parallelism,
    with_hooks,
)
from sandbox.engines.torch import tensor
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.predict import Prediction
from sandbox.program import Program

AXIS = "tp"

REASONS = {
    "ddp": "its ParallelismConfig has tensor parallelism with FSDP only, and not with DDP.",
    "zero1": "X", "zero2": "X", "zero3": "X",
}
"""Data strategies that it does not have over tp, each with the reason."""


class Options(tensor.Options):
    """Options of `tensor`: those of torch's."""


def check(config: Config, options: Options) -> None:
    """Raises ConfigError: what torch's DTensors cannot be cut into. UnsupportedError: another axis."""
    tensor.check(config, options)
    dp = config.mesh.dp
    if dp.degree > 1 and dp.strategy in REASONS:
        raise UnsupportedError(
            f"mesh.dp.strategy: under engine accelerate, {dp.strategy} beside mesh.tp: {REASONS[dp.strategy]} "
            "Set mesh.dp.strategy: fsdp."
        )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` cut over tp by torch, with model and optimizer prepared by Accelerate: here, or by fsdp."""
    forget_launcher()
    cut = tensor.apply(program, mesh, options)
    cut.model.tp_size = mesh.axis(AXIS).size  # type: ignore[assignment] # where Accelerate looks for it
    if mesh.data.size > 1:  # then `prepare` needs to be told of both axes at once
        return cut
    accelerator = make_accelerator(
        multi_device=True,
        gradient_accumulation_steps=program.config.train.microbatches,
        parallelism_config=parallelism(mesh),
    )
    model, optimizer = accelerator.prepare(cut.model, cut.make_optimizer(cut))
    return replace(
        cut,
        model=model,
        forward_backward=accumulate(accelerator, cut, mesh),
        make_optimizer=lambda finished: with_hooks(optimizer),
        clip=lambda finished, most: clip_with(accelerator, cut.parameters, most),
    )


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank: those of torch's."""
    dp = config.mesh.dp.model_copy(update={"strategy": "ddp"})  # whose sums are made as here: once a step, uncast
    as_under_ddp = config.mesh.model_copy(update={"dp": dp})
    return tensor.predict(model, mesh, options, config.model_copy(update={"mesh": as_under_ddp}))
