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

from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.config import Config
from sandbox.engines.accelerate._accelerator import accumulate, clip_with, make_accelerator, with_hooks
from sandbox.engines.torch import tensor
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.predict import Prediction
from sandbox.program import Program

AXIS = "tp"


class Options(tensor.Options):
    """Options of `tensor`: those of torch's."""


def check(config: Config, options: Options) -> None:
    """Raises ConfigError: what torch's DTensors cannot be cut into. UnsupportedError: another axis."""
    tensor.check(config, options)
    if config.mesh.world != config.mesh.tp.degree:
        raise UnsupportedError(
            "mesh: Accelerate prepares a model once, for all axes, and here each strategy prepares it for its own. "
            "Leave mesh.tp alone on the mesh."
        )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` cut over tp by torch, with model and optimizer prepared by Accelerate."""
    from accelerate import ParallelismConfig
    from torch.distributed.tensor.parallel import loss_parallel

    cut = tensor.apply(program, mesh, options)
    accelerator = make_accelerator(
        multi_device=True,
        gradient_accumulation_steps=program.config.train.microbatches,
        parallelism_config=ParallelismConfig(tp_size=mesh.axis(AXIS).size),
    )
    cut.model.tp_size = mesh.axis(AXIS).size  # type: ignore[assignment] # where Accelerate looks for it
    model, optimizer = accelerator.prepare(cut.model, cut.make_optimizer(cut))
    run = accumulate(accelerator, cut, ranks=1)

    def forward_backward(finished: Program, microbatches: list[Batch], valid: float) -> Tensor:
        with loss_parallel():  # backward too
            return run(finished, microbatches, valid)

    return replace(
        cut,
        model=model,
        forward_backward=forward_backward,
        make_optimizer=lambda finished: with_hooks(optimizer),
        clip=lambda finished, most: clip_with(accelerator, cut.parameters, most),
    )


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank: those of torch's."""
    return tensor.predict(model, mesh, options, config)
