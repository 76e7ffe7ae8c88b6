"""DeepSpeed's pipeline engine: stages one after another, by its own 1F1B schedule; beside dp, several such pipelines.

    tensor            before        in use         after backward
    parameter W       W_pp          -              -              those of the rank's stage, whole
    gradient  G       -             -              G_pp           summed over microbatches, averaged over dp
    hidden    X       -             X[b, S, D]     -              from stage to stage; its gradient on the way back
    batch     B       B[M b, S]     B[b, S]        -              all its rows; the first reads tokens, the last targets

Bytes sent by a rank in one step: X = B S D elements over all microbatches to each neighbour, forward to the next stage,
backward to the one before; and the last one's losses to all, 8 bytes each. A tied embedding lies on the first and the
last stage, and an all_reduce of V D sums its gradients. Over dp 2 (n-1)/n of a stage's gradients are sent, in one
all_reduce after the last backward; ranks of Ulysses (context.py) are data ranks to it. Memory: parameters and optimizer
state of the rank's stage. Gradients are let go with the step.

Each stage is one layer to DeepSpeed, which then has nothing left to cut. Only hidden states travel: what else a layer
needs of the batch it takes from its own copy, in the order of the microbatches. `train_batch` runs the optimizer's step
as the last instruction of its schedule; here that is left to the trainer.

Without ZeRO its pipeline clips all stages by the norm of the first. So it is told not to clip, and the sandbox does.
With ZeRO-1 on dp it clips by the norm of all.

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
from sandbox.engines.deepspeed import _cpu_adam, _engine, zero1
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.model import Transformer
from sandbox.partition import even
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, materialise
from sandbox.stages import cut, keep, shared_weight, view

AXIS = "pp"
REFUSES = {
    "float64": "without ZeRO it reduces no gradients in float64: unsupported grad type.",
    "bfloat16": "without ZeRO it has no bfloat16 with gradients accumulated in float32.",
}


class Options(Base):
    """Options of `pipeline`: none."""


def check(config: Config, options: Options) -> None:
    """Raises UnsupportedError: ZeRO-2 or ZeRO-3 on dp; more stages than parts; experts."""
    degree, layers = config.mesh.pp.degree, config.model.layers
    if config.model.experts:
        raise UnsupportedError(
            "model.experts: DeepSpeed's pipeline takes the loss of the last stage alone, and experts add theirs on "
            "every stage. Use engine native."
        )
    if config.mesh.dp.degree > 1 and config.mesh.dp.strategy not in ("ddp", "zero1"):
        raise UnsupportedError(
            "mesh.dp.strategy: DeepSpeed's pipeline refuses ZeRO-2 and ZeRO-3. Set mesh.dp.strategy: zero1, or ddp."
        )
    if config.mesh.dp.degree > 1 and config.mesh.dp.strategy == "zero1" and 2 * degree > layers + 2:
        raise UnsupportedError(
            f"mesh.pp.degree {degree}: the first stage would be the embedding alone, without a vector. There ZeRO-1 of "
            "DeepSpeed has a parameter group less than elsewhere and takes part in a sum less, for which the others "
            f"wait for ever. Set model.layers: {2 * degree - 2}, or mesh.dp.strategy: ddp."
        )
    if degree > layers + 2:
        raise UnsupportedError(
            f"mesh.pp.degree {degree}: embedding, {layers} layers and head are {layers + 2} parts. "
            f"Set model.layers: {degree - 2}, or mesh.pp.degree: {layers + 2}."
        )


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
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.schedule import OptimizerStep

    axis, model = mesh.axis("pp"), program.model
    data = mesh.axis("dp_replicate", "dp_shard", "cp").size
    assert isinstance(model, Transformer)
    tied, stage = shared_weight(model), cut(model, axis.size, "layers")[axis.rank]
    keep(model, [stage])
    params = materialise(program)
    layout = {
        name: replace(
            program.layout[name],
            sharded=(*program.layout[name].sharded, *axis.names),
            copy=int(name == tied and axis.rank == axis.size - 1),
        )
        for name in params
    }
    coming: deque[Batch] = deque()
    losses: list[Tensor] = []
    scale = 1.0

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        loss = program.loss(logits, targets) * scale
        losses.append(loss.detach().double())
        return loss

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    made = Part, view(model, stage), coming
    spec, weight = LayerSpec(*made), "model.head.weight" if axis.rank else "model.embed.weight"
    end = TiedLayerSpec("ends", *made, tied_weight_attr=weight) if tied else spec
    with torch.no_grad(), redirect_stdout(io.StringIO()):  # it prints its stages, and broadcasts what is tied
        staged = PipelineModule(
            [end, *[spec] * (axis.size - 2), end],
            axis.size,
            loss_fn=loss_of,
            partition_method="uniform",
            dynamic_shape=True,
        )
    ours = program.make_optimizer(replace(program, parameters=params, layout=layout))
    zero, clips = {"stage": 0}, {"gradient_clipping": 0.0}
    if data > 1 and program.config.mesh.dp.strategy == "zero1":
        zero, clips = zero1.section(1, zero1.Options.model_validate(program.config.mesh.dp.options)), {}
        for name, param in params.items():  # tied are to it whole stages, and only the first counts in the norm
            param.ds_pipe_replicated = name == tied and axis.rank > 0  # type: ignore[attr-defined]
    inner = _cpu_adam.optimizer(ours, offload="offload_optimizer" in zero)
    engine = _engine.initialize(replace(program, model=staged), inner, zero, **clips)
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
        loss = run(microbatches, data * len(microbatches) / valid, engine.train_batch)
        finished.reduce_grads()
        return loss / valid

    def evaluate(finished: Program, batch: Batch) -> Tensor:
        return run([batch], 1.0, engine.eval_batch, num_micro_batches=1)

    # rows are cut over dp by the strategy of dp, which has nothing else left to do (ddp.py)
    driven = _engine.drive(replace(program, parameters=params, layout=layout), engine, inner, mesh, lambda: None)
    return replace(
        driven,
        model=model,
        shard_batch=program.shard_batch,
        forward_backward=forward_backward,
        evaluate=evaluate,
        clip=program.clip if clips else driven.clip,
    )


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank; cuts `model` down to its stage."""
    axis = mesh.axis("pp")
    assert isinstance(model, Transformer)
    tied = shared_weight(model)
    keep(model, [cut(model, axis.size, "layers")[axis.rank]])
    borders = (axis.rank > 0) + (axis.rank < axis.size - 1)
    rows = even(config.train.batch, mesh.data.size)[mesh.data.rank]
    columns = config.data.sequence // mesh.axis("cp").size
    traffic = {f"send {mesh.everyone.name}": borders * rows * columns * config.model.width * 4}
    if axis.rank == axis.size - 1:
        traffic[f"broadcast {axis.name}"] = 8 * (axis.size - 1)
    if tied and borders < 2:
        pair = axis.name if axis.size == 2 else "other"  # the two ends are no axis of the mesh
        traffic[f"all_reduce {pair}"] = bytes_of([model.get_parameter(tied)])
    whole = bytes_of(model.parameters())
    return Prediction(traffic, {"parameters": whole, "gradients": 0, "optimizer": state_copies(config.train) * whole})
