"""Accelerate's DeepSpeed plugin: the engine that `prepare` makes, in the hands of the trainer."""

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor

from sandbox.comm import Axis
from sandbox.engines.accelerate._accelerator import forget_launcher, make_accelerator
from sandbox.engines.deepspeed import _autotp, _engine
from sandbox.mesh import Mesh
from sandbox.program import Program

__all__ = ["apply_plugin"]

Place = Callable[[Program, Axis], tuple[Program, Callable[[], None]]]


def apply_plugin(program: Program, mesh: Mesh, zero: Mapping[str, Any], place: Place) -> Program:
    """Return `program` run by the DeepSpeed engine that Accelerate prepares; `zero` is its `zero_optimization`.

    `accelerator.backward` takes DeepSpeed's step with the last microbatch, before anybody can see a gradient or set a
    rate. It is held back until the trainer steps.
    """
    forget_launcher()
    accelerator: Any = None

    def initialize(program: Program, inner: torch.optim.Optimizer, zero: Mapping[str, Any], **others: Any) -> Any:
        from accelerate import DeepSpeedPlugin

        nonlocal accelerator
        _engine.prepare()
        settings = _engine.settings(program.config, zero) | others
        accelerator = make_accelerator(
            multi_device=True,
            gradient_accumulation_steps=program.config.train.microbatches,
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        )
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory
            return accelerator.prepare(program.model, inner)[0]

    held, engine, inner = _autotp.start(program, mesh, zero, initialize)
    placed, collect = place(held, mesh.axis("dp_shard", "cp"))

    def backward(loss: Tensor, final: bool) -> None:
        with accelerator.accumulate(engine):
            accelerator.backward(loss)

    driven = _engine.drive(placed, engine, inner, mesh, collect, backward)
    engine.step = lambda: None
    return driven
