"""DeepSpeed's ZeRO stage 1: gradients summed everywhere, the optimizer's copy of parameters and state cut in ranges.

    tensor            before        after backward      after reduction         after the step
    parameter W       W[N]          -                   -                       W[N]
    gradient  G       -             G[N]{U_dp}          own range: G[N_dp]      -
    optimizer W, M    W[N_dp], M[N_dp]                  -                       W[N_dp], M[N_dp]
    batch     X       X[B_dp, S]    -                   -                       -

N: elements of a parameter group, matrices or vectors, end to end, padded to a multiple of 2n; `N_dp`: cut over dp into
equal parts, whose bounds do not heed parameters; `{U_dp}`: not yet summed over dp.

Bytes sent by a rank in one step: 2 (n-1)/n P to all_reduce all gradients (n ranks, P bytes), where stage 1 could do
with half, and (n-1)/n P' to all_gather the new parameters, P' with the padding. Memory: parameters in full, and a
second copy of the own range in float32 even where parameters are float32: (1 + (1 + K)/n) P'. Gradients are let go
with the step.

In bfloat16 parameters, gradients and what travels are bfloat16, accumulated in float32. `offload` takes the code path
that keeps the optimizer's side in the host's memory, which here is the same memory; and AdamW is then DeepSpeed's own,
compiled ahead (_cpu_adam.py).

Source: DeepSpeed 0.19.8; Rajbhandari et al., "ZeRO", SC 2020, 5.1.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.comm import Axis, ring_bytes
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.engines.deepspeed import _autotp, _cpu_adam, _engine
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, state_copies
from sandbox.program import Program, shard_rows

AXIS = "dp"
REFUSES = _engine.REFUSES
ROUNDS = True


class Options(Base):
    """Options of `zero1`."""

    bucket_mb: float = Field(25.0, gt=0, description="MiB of gradients, or of parameters, that travel together")
    offload: bool = Field(False, description="offload_optimizer: state and step in the host's memory")


def check(config: Config, options: Options) -> None:
    """Raises UnsupportedError: replicas. ConfigError: an optimizer that cannot be compiled here."""
    if config.mesh.dp.replicas > 1:
        raise UnsupportedError(
            "mesh.dp.replicas: DeepSpeed cuts optimizer state over all data ranks. Set mesh.dp.replicas: 1."
        )
    if _cpu_adam.wanted(config, options.offload):
        _cpu_adam.check()


def ahead(config: Config, options: Options) -> None:
    """Have DeepSpeed's AdamW compiled, if it is to be used. Raises ConfigError: it cannot be."""
    if _cpu_adam.wanted(config, options.offload):
        _cpu_adam.build()


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` run by a DeepSpeed engine of stage 1, or by that of the pipeline."""
    if mesh.axis("pp").size > 1:
        return beside_pipeline(program, mesh)
    return apply_stage(1, program, mesh, options)


def beside_pipeline(program: Program, mesh: Mesh) -> Program:
    """Return `program`, which is run by the pipeline's engine with stage 1 (pipeline.py), with its rows cut over dp."""
    placed, collect = place(program, mesh.axis("dp_shard", "cp"))

    def forward_backward(finished: Program, microbatches: list[Batch], valid: float) -> Tensor:
        loss = program.forward_backward(finished, microbatches, valid)
        collect()
        return loss

    def refresh() -> None:
        program.refresh()
        for piece in placed.parameters.values():
            piece.grad = None  # the engine has let go of it too

    rows = shard_rows(program, mesh)
    return replace(placed, shard_batch=rows, forward_backward=forward_backward, refresh=refresh)


def apply_stage(stage: int, program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` run by a DeepSpeed engine whose optimizer works on ranges of the flattened parameters."""
    held, engine, inner = _autotp.start(program, mesh, section(stage, options))
    placed, collect = place(held, mesh.axis("dp_shard", "cp"))
    return _engine.drive(placed, engine, inner, mesh, collect)


def section(stage: int, options: Options) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization` for stages 1 and 2."""
    elements = max(2, int(options.bucket_mb * 2**18) // 2 * 2)
    offload = {"offload_optimizer": {"device": "cpu"}} if options.offload else {}
    return {"stage": stage, "reduce_bucket_size": elements, "allgather_bucket_size": elements, **offload}


def place(program: Program, axis: Axis) -> tuple[Program, Callable[[], None]]:
    """Return `program` with the parameters of this rank, and what gives them their gradients."""
    params: dict[str, Any] = dict(program.model.named_parameters())
    owned = {name: param._hp_mapping for name, param in params.items() if param._hp_mapping}
    pieces = {name: nn.Parameter(found.hp_fragment.detach()) for name, found in owned.items()}

    def collect() -> None:
        for name, found in owned.items():  # what `safe_get_full_grad` would put together from all ranks
            grad: Tensor = found.get_lp_grad_fragment(params[name]._index_in_param_group).detach().view(-1)
            at = found.lp_fragment_address
            own = grad if grad.numel() == at.numel else grad[at.start : at.start + at.numel]  # bfloat16 keeps it whole
            pieces[name].grad = own.to(pieces[name].dtype)

    layout = {}
    for name, found in owned.items():
        at = found.lp_fragment_address
        layout[name] = program.layout[name].range(at.start, at.start + at.numel, axis.names)
    return replace(program, parameters=pieces, layout=layout), collect


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    prediction = predict_stage(model, mesh, options, config, rounds=1)
    if config.train.dtype != "bfloat16" or options.offload:
        return prediction
    axis = mesh.axis("dp_shard", "cp")
    padded = sum(parts(model, axis.size)) * axis.size * 2  # of its optimizer for bfloat16 alone, which has no offload
    return replace(prediction, traffic={**prediction.traffic, f"all_reduce {axis.name}": ring_bytes(padded, axis.size)})


def predict_stage(model: nn.Module, mesh: Mesh, options: Options, config: Config, rounds: int) -> Prediction:
    """The same, if gradients are summed `rounds` times a step."""
    axis = mesh.axis("dp_shard", "cp")
    short = 2 if config.train.dtype == "bfloat16" else 4
    part = sum(parts(model, axis.size))
    elements = sum(p.numel() for p in model.parameters())
    return Prediction(
        traffic={
            f"all_reduce {axis.name}": rounds * ring_bytes(elements * short, axis.size),
            f"all_gather {axis.name}": (axis.size - 1) * part * short,
        },
        memory={
            "parameters": axis.size * part * short + part * 4,
            "gradients": 0,
            "optimizer": state_copies(config.train) * part * 4,
        },
    )


def parts(model: nn.Module, ranks: int) -> Iterator[int]:
    """Elements of a rank's part of each parameter group, padding included."""
    for matrix in (True, False):
        elements = sum(p.numel() for p in model.parameters() if (p.dim() >= 2) == matrix)
        yield -(-elements // (2 * ranks)) * 2
