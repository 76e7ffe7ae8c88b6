"""Accelerate's DeepSpeed plugin with ZeRO stage 2: DeepSpeed's engine, made by `prepare` and run by `backward`.

What is cut and what is sent: as engine deepspeed's zero2, to the byte. Memory too.

Between the two stand `accumulate`, which tells the engine which microbatch is the last, and `backward`, which takes
the step with it (_plugin.py).

Source: Accelerate 1.15, DeepSpeed 0.19.8.
"""

from torch import nn

from sandbox.config import Config
from sandbox.engines.accelerate._plugin import apply_plugin
from sandbox.engines.deepspeed import zero1, zero2
from sandbox.mesh import Mesh
from sandbox.predict import Prediction
from sandbox.program import Program

AXIS = "dp"
REFUSES = zero2.REFUSES
ROUNDS = zero2.ROUNDS
check, ahead = zero2.check, zero2.ahead


class Options(zero2.Options):
    """Options of `zero2`: those of DeepSpeed's."""


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` run by the DeepSpeed engine that Accelerate prepares."""
    return apply_plugin(program, mesh, zero1.section(2, options), zero1.place)


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank: those of DeepSpeed."""
    return zero2.predict(model, mesh, options, config)
