"""Accelerate's DeepSpeed plugin: the engine that `prepare` makes, in the hands of the trainer."""

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

from torch import Tensor

from sandbox.comm import Axis
from sandbox.engines.accelerate._accelerator import forget_launcher, make_accelerator
from sandbox.engines.deepspeed import _engine
from sandbox.mesh import Mesh
from sandbox.program import Program, materialise

__all__ = ["apply_plugin"]

Place = Callable[[Program, Axis], tuple[Program, Callable[[], None]]]


def apply_plugin(program: Program, mesh: Mesh, zero: Mapping[str, Any], place: Place) -> Program:
    """Return `program` run by the DeepSpeed engine that Accelerate prepares; `zero` is its `zero_optimization`.

    `accelerator.backward` takes DeepSpeed's step with the last microbatch, before anybody can see a gradient or set a
    rate. It is held back until the trainer steps.
    """
    from accelerate import DeepSpeedPlugin

    forget_launcher()
    _engine.prepare()
    settings = _engine.settings(program.config, zero)
    accelerator = make_accelerator(
        multi_device=True,
        gradient_accumulation_steps=program.config.train.microbatches,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
    )
    inner = program.make_optimizer(replace(program, parameters=materialise(program)))
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory
        engine, _ = accelerator.prepare(program.model, inner)
    placed, collect = place(program, mesh.axis("dp_shard", "cp"))

    def backward(loss: Tensor, final: bool) -> None:
        with accelerator.accumulate(engine):
            accelerator.backward(loss)

    driven = _engine.drive(placed, engine, inner, mesh, collect, backward)
    engine.step = lambda: None
    return driven
