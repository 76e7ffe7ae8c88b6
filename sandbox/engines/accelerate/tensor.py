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

Beside dp one `prepare` knows of all axes. With fsdp, `ParallelismConfig(dp_replicate_size, dp_shard_size, tp_size)`,
FSDP2 cuts again what torch has cut (fsdp.py). With zero1 to zero3, the DeepSpeed plugin, it is DeepSpeed's AutoTP that
cuts, as its engine starts: what, and at what cost, says engine deepspeed's tensor. DDP it does not put over tp.

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
from sandbox.engines.deepspeed import tensor as autotp
from sandbox.engines.torch import tensor
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.predict import Prediction
from sandbox.program import Program

AXIS = "tp"


class Options(tensor.Options):
    """Options of `tensor`: those of torch's."""


def check(config: Config, options: Options) -> None:
    """Raises ConfigError: what torch's DTensors, or AutoTP, cannot be cut into. UnsupportedError: beside DDP."""
    if by_autotp(config):
        autotp.check(config, autotp.Options())
        if options.sequence:
            raise UnsupportedError(
                "mesh.tp.sequence: with its DeepSpeed plugin Accelerate cuts by DeepSpeed's AutoTP, which has none "
                "of it. Set mesh.tp.sequence: false, or mesh.dp.strategy: fsdp."
            )
        return
    tensor.check(config, options)
    if config.mesh.dp.degree > 1 and config.mesh.dp.strategy == "ddp":
        raise UnsupportedError(
            "mesh.dp.strategy: Accelerate refuses a ParallelismConfig of tensor parallelism with data parallelism that "
            "cuts nothing. Set mesh.dp.strategy: fsdp."
        )


def by_autotp(config: Config) -> bool:
    """Whether DeepSpeed cuts, as its engine starts, and not torch."""
    return config.mesh.dp.degree > 1 and config.mesh.dp.strategy in ("zero1", "zero2", "zero3")


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` cut over tp, with model and optimizer prepared by Accelerate: here, or by the data strategy."""
    if by_autotp(program.config):
        return program
    forget_launcher()
    cut = tensor.apply(program, mesh, options)
    cut.model.tp_size = mesh.axis(AXIS).size  # type: ignore[assignment] # where Accelerate looks for it
    if mesh.data.size > 1:  # `prepare` is to be told of both axes at once
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
    if by_autotp(config):
        return autotp.predict(model, mesh, autotp.Options(), config)
    dp = config.mesh.dp.model_copy(update={"strategy": "ddp"})  # whose sums are made as here: once a step, uncast
    as_under_ddp = config.mesh.model_copy(update={"dp": dp})
    return tensor.predict(model, mesh, options, config.model_copy(update={"mesh": as_under_ddp}))
