"""DeepSpeed's ZeRO stage 3: every parameter cut in ranges, gathered module by module on use, and freed.

    tensor            before        in use              after backward      after reduction
    parameter W       W[N_dp]       W[N]                W[N_dp]             W[N_dp]
    gradient  G       -             -                   G[N]{U_dp}          G[N_dp]
    optimizer W, M    W[N_dp], M[N_dp]                  -                   W[N_dp], M[N_dp]
    batch     X       X[B_dp, S]    -                   -                   -

N: elements of one parameter; `N_dp`: cut over dp into equal ranges of ceil(N/n), so the last ranks hold padding;
`{U_dp}`: not yet summed over dp.

Bytes sent by a rank for each microbatch, with P' bytes of parameters and padding, n ranks: (n-1)/n P' to all_gather for
forward, as much again for backward, and as much to reduce_scatter gradients. Memory: (1 + 1 + K)/n P', for there is a
second copy of the own ranges in float32 even where parameters are float32, and the modules in use.

By default DeepSpeed keeps parameters below 100,000 elements whole, and does not free what it will use again soon. Both
are switched off here, for in a model of this size they leave nothing to be cut.

Source: DeepSpeed 0.19.8; Rajbhandari et al., "ZeRO", SC 2020, 5.3.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from sandbox.comm import Axis
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.engines.deepspeed import _autotp, _engine, zero1
from sandbox.mesh import Mesh
from sandbox.model import Attention, Block
from sandbox.predict import Prediction, state_copies
from sandbox.program import Program

AXIS = "dp"
REFUSES = _engine.REFUSES
ROUNDS = True
check, ahead = zero1.check, zero1.ahead


class Options(Base):
    """Options of `zero3`."""

    bucket_mb: float = Field(25.0, gt=0, description="MiB of gradients that travel together")
    offload: bool = Field(False, description="offload_optimizer: state and step in the host's memory")


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` run by a DeepSpeed engine of stage 3."""
    held, engine, inner = _autotp.start(program, mesh, section(options))
    placed, collect = place(held, mesh.axis("dp_shard", "cp"))
    return _engine.drive(placed, engine, inner, mesh, collect)


def section(options: Options) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization` for stage 3."""
    offload = {"offload_optimizer": {"device": "cpu"}} if options.offload else {}
    return {
        "stage": 3,
        "reduce_bucket_size": int(options.bucket_mb * 2**18),
        # By default small parameters stay whole, and so would a small model
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
        **offload,
    }


def place(program: Program, axis: Axis) -> tuple[Program, Callable[[], None]]:
    """Return `program` with the parameters of this rank, and what gives them their gradients."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

    params: dict[str, Any] = dict(program.model.named_parameters())
    pieces, layout = dict[str, nn.Parameter](), {}
    for name, param in params.items():
        part = safe_get_local_fp32_param(param).detach()
        start = min(axis.rank * part.numel(), param.ds_numel)
        stop = min(start + part.numel(), param.ds_numel)
        pieces[name] = nn.Parameter(part[: stop - start])
        layout[name] = program.layout[name].range(start, stop, axis.names)

    def collect() -> None:
        for name, piece in pieces.items():
            grad: Tensor = safe_get_local_grad(params[name])
            piece.grad = grad[: piece.numel()]

    return replace(program, parameters=pieces, layout=layout), collect


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    axis = mesh.axis("dp_shard", "cp")
    short = 2 if config.train.dtype == "bfloat16" else 4
    part = sum(-(-p.numel() // axis.size) for p in model.parameters())
    passes = config.train.microbatches
    uses = 2 * part
    if config.model.tied:  # by the embedding and by the head
        uses += 2 * -(-model.get_parameter("embed.weight").numel() // axis.size)
    again = {"none": (), "selective": (Attention,), "full": (Block,)}[config.train.recompute]
    for module in (module for module in model.modules() if isinstance(module, again)):
        used = (p for name, p in module.named_parameters() if not name.startswith("o."))  # attention stops before it
        uses += sum(-(-p.numel() // axis.size) for p in used)
    return Prediction(
        traffic={
            f"all_gather {axis.name}": passes * (axis.size - 1) * uses * short,
            f"reduce_scatter {axis.name}": passes * (axis.size - 1) * part * short,
        },
        memory={"parameters": part * (short + 4), "gradients": 0, "optimizer": state_copies(config.train) * part * 4},
    )
