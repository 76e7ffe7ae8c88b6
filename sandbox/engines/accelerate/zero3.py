"""Accelerate's DeepSpeed plugin with ZeRO stage 3: DeepSpeed's engine, made by `prepare` and run by `backward`.

What is cut and what is sent: as engine deepspeed's zero3, to the byte. Memory too.

Between the two stand `accumulate`, which tells the engine which microbatch is the last, and `backward`, which takes
the step with it (_plugin.py).

Source: Accelerate 1.15, DeepSpeed 0.19.8.
"""

from torch import nn

from sandbox.config import Config
from sandbox.engines.accelerate._plugin import apply_plugin
from sandbox.engines.deepspeed import zero3
from sandbox.mesh import Mesh
from sandbox.predict import Prediction
from sandbox.program import Program

AXIS = "dp"
REFUSES = zero3.REFUSES
ROUNDS = zero3.ROUNDS
check, ahead = zero3.check, zero3.ahead


class Options(zero3.Options):
    """Options of `zero3`: those of DeepSpeed's."""


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` run by the DeepSpeed engine that Accelerate prepares."""
    return apply_plugin(program, mesh, zero3.section(options), zero3.place)


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank: those of DeepSpeed."""
    return zero3.predict(model, mesh, options, config)
