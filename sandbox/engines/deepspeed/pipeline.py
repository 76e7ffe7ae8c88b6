"""DeepSpeed's pipeline engine: stages one after another, by its own 1F1B schedule.

    tensor            before        in use         after backward
    parameter W       W_pp          -              -              those of the rank's stage, whole
    gradient  G       -             -              G_pp           summed over microbatches
    hidden    X       -             X[b, S, D]     -              from stage to stage; its gradient on the way back
    batch     B       B[M b, S]     B[b, S]        -              everywhere; the first reads tokens, the last targets

Bytes sent by a rank in one step: X = B S D elements over all microbatches to each neighbour, forward to the next stage,
backward to the one before; and the last one's losses to all, 8 bytes each. Memory: parameters and optimizer state of
the rank's stage. Gradients are let go with the step.

Each stage is one layer to DeepSpeed, which then has nothing left to cut. Only hidden states travel: what else a layer
needs of the batch it takes from its own copy, in the order of the microbatches. `train_batch` runs the optimizer's step
as the last instruction of its schedule; here that is left to the trainer.

Without ZeRO its pipeline clips all stages by the norm of the first. So it is told not to clip, and the sandbox does.

Source: DeepSpeed 0.19.8; Narayanan et al., "PipeDream", SOSP 2019 (1F1B).
"""

import io
from collections import deque
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.engines.deepspeed import _engine
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.model import Transformer
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, materialise
from sandbox.stages import cut, keep

AXIS = "pp"
REFUSES = {
    "float64": "the dtypes of what its stages pass on are float32 or less.",
    "bfloat16": "without ZeRO it has no bfloat16 with gradients accumulated in float32.",
}


class Options(Base):
    """Options of `pipeline`: none."""


def check(config: Config, options: Options) -> None:
    """Raises UnsupportedError: another axis, or a tied embedding."""
    degree, layers = config.mesh.pp.degree, config.model.layers
    if config.mesh.world != degree:
        raise UnsupportedError("mesh: DeepSpeed's pipeline is the data axis too. Leave mesh.pp alone on the mesh.")
    if config.model.tied:
        raise UnsupportedError(
            "model.tied: DeepSpeed ties the weights of layers that it builds. Set model.tied: false."
        )
    if degree > layers + 2:
        raise UnsupportedError(f"mesh.pp.degree {degree}: embedding, {layers} layers and head are {layers + 2} parts.")


class Part(nn.Module):
    """A stage as one layer of DeepSpeed's, with the batches that are still to come."""

    def __init__(self, model: nn.Module, coming: deque[Batch]) -> None:
        super().__init__()
        self.model, self.coming = model, coming

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states, or tokens in the first stage -> hidden states, or logits in the last."""
        out: Tensor = self.model(self.coming.popleft(), x)
        return out


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with this rank's stage, run by DeepSpeed."""
    _engine.prepare()
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.schedule import OptimizerStep

    axis, model = mesh.axis("pp"), program.model
    assert isinstance(model, Transformer)
    keep(model, [cut(model, axis.size, "layers")[axis.rank]])
    params = materialise(program)
    layout = {
        name: replace(program.layout[name], sharded=(*program.layout[name].sharded, *axis.names)) for name in params
    }
    coming: deque[Batch] = deque()
    losses: list[Tensor] = []
    scale = 1.0

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        loss = program.loss(logits, targets) * scale
        losses.append(loss.detach().double())
        return loss

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    with redirect_stdout(io.StringIO()):  # it prints its stages
        staged = PipelineModule(
            [LayerSpec(Part, model, coming)] * axis.size,
            axis.size,
            loss_fn=loss_of,
            partition_method="uniform",
            dynamic_shape=True,
        )
    inner = program.make_optimizer(replace(program, parameters=params, layout=layout))
    engine = _engine.initialize(replace(program, model=staged), inner, {"stage": 0}, gradient_clipping=0.0)
    take_step = engine._exec_optimizer_step
    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {OptimizerStep: lambda engine: None}
    engine.step = take_step

    def run(batches: list[Batch], factor: float, how: Any, **settings: Any) -> Tensor:
        nonlocal scale
        scale = factor
        losses.clear()
        coming.extend(batches)
        how(iter([(batch.tokens, batch.targets) for batch in batches]), **settings)
        return torch.stack(losses).sum() / factor if losses else torch.zeros((), dtype=torch.float64)

    def forward_backward(finished: Program, microbatches: list[Batch], valid: float) -> Tensor:
        program.begin(True)
        loss = run(microbatches, len(microbatches) / valid, engine.train_batch)
        finished.reduce_grads()
        return loss / valid

    def evaluate(finished: Program, batch: Batch) -> Tensor:
        return run([batch], 1.0, engine.eval_batch, num_micro_batches=1)

    driven = _engine.drive(replace(program, parameters=params, layout=layout), engine, inner, mesh, lambda: None)
    return replace(
        driven,
        model=model,
        shard_batch=program.shard_batch,
        forward_backward=forward_backward,
        evaluate=evaluate,
        clip=program.clip,
    )


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank; cuts `model` down to its stage."""
    axis = mesh.axis("pp")
    assert isinstance(model, Transformer)
    keep(model, [cut(model, axis.size, "layers")[axis.rank]])
    borders = (axis.rank > 0) + (axis.rank < axis.size - 1)
    sent = borders * config.train.batch * config.data.sequence * config.model.width * 4
    told = 8 * (axis.size - 1) if axis.rank == axis.size - 1 else 0
    whole = bytes_of(model.parameters())
    return Prediction(
        {f"send {axis.name}": sent, f"broadcast {axis.name}": told},
        {"parameters": whole, "gradients": 0, "optimizer": state_copies(config.train) * whole},
    )
