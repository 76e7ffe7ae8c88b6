"""Accelerate's DeepSpeed plugin with ZeRO stage 1: DeepSpeed's engine, made by `prepare` and run by `backward`.

What is cut and what is sent: as engine deepspeed's zero1, to the byte. Memory too.

Between the two stand `accumulate`, which tells the engine which microbatch is the last, and `backward`, which takes
the step with it (_plugin.py).

Source: Accelerate 1.15, DeepSpeed 0.19.8.
"""

from torch import nn

from sandbox.config import Config
from sandbox.engines.accelerate._plugin import apply_plugin
from sandbox.engines.deepspeed import zero1
from sandbox.mesh import Mesh
from sandbox.predict import Prediction
from sandbox.program import Program

AXIS = "dp"
REFUSES = zero1.REFUSES
ROUNDS = zero1.ROUNDS
check, ahead = zero1.check, zero1.ahead


class Options(zero1.Options):
    """Options of `zero1`: those of DeepSpeed's."""


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` run by the DeepSpeed engine that Accelerate prepares."""
    return apply_plugin(program, mesh, zero1.section(1, options), zero1.place)


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank: those of DeepSpeed."""
    return zero1.predict(model, mesh, options, config)
