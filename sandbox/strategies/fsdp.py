"""Fully sharded data parallelism: every parameter is cut by rows, gathered block by block on use, and freed.

    tensor            before        in use              after backward      after reduction
    parameter W       W[D_dp, F]    W[D, F]             W[D_dp, F]          W[D_dp, F]
    gradient  G       -             -                   G[D, F]{U_dp}       G[D_dp, F]
    optimizer M       M[D_dp, F]    -                   -                   M[D_dp, F]
    batch     X       X[B_dp, S]    -                   -                   -

`W[D_dp, F]` reads: rows cut over dp and cp (uneven where n does not divide D); `{U_dp}`: not yet summed over them.

Bytes sent by a rank for each microbatch (n ranks, P bytes of parameters): (n-1)/n P to all_gather parameters in
forward, as much again for backward, and as much to reduce_scatter gradients: 3 (n-1)/n P, as ZeRO-3, less what need not
be gathered twice (units.py). With
`reshard_after_forward: false` parameters stay whole from their first use in a step to the last backward: one gather a
step instead of two a microbatch, for the memory of all parameters. In bfloat16 parameters and gradients travel as
bfloat16 and gradients are summed in float32; those that add up before they travel, over microbatches with `sync: last`
or in a pipeline, do both in float32. With r replicas (HSDP) parts are summed over dp_replicate once a step:
2 (r-1)/r P/n bytes more.
Memory: (2 + K)/n P (K: 2 for AdamW, 1 for SGD with momentum), two whole blocks in use, and what backward has under way.

The difference to ZeRO-3 is the cut: a piece is rows of its parameter, a box, so checkpoints and optimizers see a
matrix, and tensor parallelism can cut the other dimension; the price is a copy after each gather.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023, and its FSDP2.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.mesh import Mesh
from sandbox.partition import by_rows
from sandbox.predict import Prediction
from sandbox.program import Program
from sandbox.units import gather_on_use, predict_units

AXIS = "dp"


class Options(Base):
    """Options of `fsdp`."""

    reshard_after_forward: bool = Field(True, description="free parameters between forward and backward")
    prefetch: bool = Field(True, description="gather the next unit while this one computes")
    sync: Literal["each", "last"] = Field("each", description="reduce after each microbatch, or after the last only")


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with all its state cut by rows over dp_shard x cp, and parameters gathered on use."""
    return gather_on_use(
        program,
        mesh,
        by_rows,
        reshard_after_forward=options.reshard_after_forward,
        each=options.sync == "each",
        prefetch=options.prefetch,
    )


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    return predict_units(
        model,
        mesh,
        by_rows,
        config,
        reshard_after_forward=options.reshard_after_forward,
        each=options.sync == "each",
    )
