"""ZeRO stage 3: a rank keeps only its part of parameters, gradients and optimizer state.

    tensor            before        in use              after backward      after reduction
    parameter W       W[N_dp]       W[N]                W[N_dp]             W[N_dp]
    gradient  G       -             -                   G[N]{U_dp}          G[N_dp]
    optimizer M       M[N_dp]       -                   -                   M[N_dp]
    batch     X       X[B_dp, S]    -                   -                   -

N: elements of a unit (a block, the embedding, or the final norm with the head), its parameters flattened end to end;
`N_dp`: cut over dp and cp into ranges of equal size, wherever they begin and end; `{U_dp}`: not yet summed.

Bytes sent by a rank for each microbatch (n ranks, P bytes of parameters): (n-1)/n P to all_gather parameters in
forward, as much again for backward, and as much to reduce_scatter gradients: 3 (n-1)/n P, less what need not be
gathered twice (units.py). With r replicas, 2 (r-1)/r P/n more, once a step. In bfloat16 parameters and gradients travel
as bfloat16 and gradients are summed in float32; gradients that add up before they travel, over microbatches with
`sync: last` or in a pipeline, are float32.
Memory: (2 + K)/n P (K: 2 for AdamW, 1 for SGD with momentum), two whole units while they are in use, and what backward
has under way.

Ranges fill a unit's flat tensor in rank order, so what is gathered lies where it is used: no copies.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, 5.3.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.mesh import Mesh
from sandbox.partition import by_ranges
from sandbox.predict import Prediction
from sandbox.program import Program
from sandbox.units import gather_on_use, predict_units

AXIS = "dp"


class Options(Base):
    """Options of `zero3`."""

    prefetch: bool = Field(True, description="gather the next unit while this one computes")
    sync: Literal["each", "last"] = Field("each", description="reduce after each microbatch, or after the last only")


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with all its state cut over dp_shard x cp, and parameters gathered on use."""
    return gather_on_use(
        program, mesh, by_ranges, reshard_after_forward=True, each=options.sync == "each", prefetch=options.prefetch
    )


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    return predict_units(model, mesh, by_ranges, config, reshard_after_forward=True, each=options.sync == "each")
