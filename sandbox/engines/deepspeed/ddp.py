"""DeepSpeed without ZeRO (stage 0): the model in full on every rank, gradients averaged once, before the step.

    tensor            before        after backward      after reduction
    parameter W       W[D, F]       -                   W[D, F]           replicated over dp
    gradient  G       -             G[D, F]{U_dp}       G[D, F]           a partial sum, then averaged
    optimizer M       M[D, F]       -                   M[D, F]           replicated over dp
    batch     X       X[B_dp, S]    -                   -                 rows cut over dp

`X[B_dp, S]` reads: B is cut over axis dp; `{U_dp}`: not yet summed over dp.

Bytes sent by a rank in one step: 2 (n-1)/n P to all_reduce P bytes of gradients over n ranks, all in one piece after
the last backward, so nothing overlaps. Memory: parameters, gradients and optimizer state in full. Beside a pipeline the
same, of the rank's stage: its engine averages gradients over dp as well.

Source: DeepSpeed 0.19.8.
"""

from dataclasses import replace

from torch import nn

from sandbox.comm import ring_bytes
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.engines.deepspeed import _autotp, _engine
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, shard_rows

AXIS = "dp"
REFUSES = _engine.REFUSES | {"bfloat16": "it has no stage 0 in bfloat16 with gradients accumulated in float32."}


class Options(Base):
    """Options of `ddp`: none."""


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` run by a DeepSpeed engine of stage 0, or by that of the pipeline, with its rows cut over dp."""
    if mesh.axis("pp").size > 1:
        return replace(program, shard_batch=shard_rows(program, mesh))
    held, engine, inner = _autotp.start(program, mesh, {"stage": 0})
    driven = _engine.drive(held, engine, inner, mesh, lambda: None)
    return replace(driven, clip=lambda finished, most: program.clip(finished, None))  # the engine tells no norm


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    axis = mesh.axis("dp_replicate", "dp_shard", "cp")
    whole = bytes_of(model.parameters())
    return Prediction(
        traffic={f"all_reduce {axis.name}": ring_bytes(whole, axis.size)},
        memory={"parameters": whole, "gradients": 0, "optimizer": state_copies(config.train) * whole},
    )
