"""DeepSpeed's ZeRO stage 2: as stage 1, and a rank keeps only its range of the gradients, between microbatches too.

    tensor            before        after backward      after reduction         after the step
    parameter W       W[N]          -                   -                       W[N]
    gradient  G       -             G[N]{U_dp}          G[N_dp]                 -
    optimizer W, M    W[N_dp], M[N_dp]                  -                       W[N_dp], M[N_dp]
    batch     X       X[B_dp, S]    -                   -                       -

For the ranges see stage 1 (zero1.py). Bytes sent by a rank in one step: M times 2 (n-1)/n P, for every one of M
microbatches is reduced, and by all_reduce of whole buckets though only a range is kept; and (n-1)/n P' to all_gather
the new parameters. Memory: as stage 1, and less in between.

Source: DeepSpeed 0.19.8; Rajbhandari et al., "ZeRO", SC 2020, 5.2.
"""

from torch import nn

from sandbox.config import Config
from sandbox.engines.deepspeed import zero1
from sandbox.mesh import Mesh
from sandbox.predict import Prediction
from sandbox.program import Program

AXIS = "dp"
REFUSES = zero1.REFUSES
ROUNDS = True
check, ahead = zero1.check, zero1.ahead


class Options(zero1.Options):
    """Options of `zero2`."""


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` run by a DeepSpeed engine of stage 2."""
    return zero1.apply_stage(2, program, mesh, options)


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    return zero1.predict_stage(model, mesh, options, config, rounds=config.train.microbatches)
