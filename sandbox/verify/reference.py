"""The unsharded run, and how exactly it is known: what a sharded one is held against.

The reference is the same code with an empty plan, in one process. It is run a second time with its sums taken in
another order, and, below float64, a third time from parameters moved by one unit in the last place. How far these
drift apart is the noise of the training itself:

    floor       a gradient that is zero in exact arithmetic (a key's bias, without rotary positions) is noise. A tensor
                whose noise exceeds 256 eps of its size is measured against noise / (256 eps) instead of its size.
    tolerance   float64: 1e-12. Below: 4 times the largest noise of any tensor. In bfloat16, where a strategy keeps
                the model's own parameters as bfloat16, the third run is from parameters rounded to that.
"""

import functools
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sandbox.config import Config
from sandbox.plan import plan
from sandbox.program import training_loss
from sandbox.runtime import Member
from sandbox.trainer import Trainer
from sandbox.verify.capture import Capture, Subject, capture
from sandbox.verify.compare import assemble, spread

__all__ = ["Reference", "References", "RowLoss", "World"]

World = Callable[..., list[Any]]
"""(ranks, work, *arguments, timeout=seconds) -> what each rank's `work(member, *arguments)` returned."""

RowLoss = tuple[float, int]  # sum of losses, valid targets

FLOOR = 256  # eps of a tensor's size, beyond which its noise makes it a zero
MARGIN = 4  # tolerances below float64, in units of the noise
EXACT = 1e-12  # tolerance in float64


@dataclass(frozen=True)
class Reference:
    """The unsharded run, by step, and what its noise says of floors and tolerance."""

    run: Capture
    gradients: list[dict[str, Tensor]]
    parameters: list[dict[str, Tensor]]
    buffers: list[dict[str, Tensor]]
    floors: list[dict[str, float]]  # of the gradients
    tolerance: float
    rows: list[RowLoss]  # of the first step


class References:
    """Reference runs, each run once for all cases that share its training."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: dict[tuple[str, bytes], Reference] = {}
        self._lock = threading.Lock()

    def of(self, config: Config, subject: Subject | None = None) -> Reference:
        """The unsharded run of a training, from memory if it was run before."""
        rounded = any(getattr(p.strategy, "ROUNDS", False) for p in plan(config))
        move = round_off if rounded and config.train.dtype == "bfloat16" else nudge
        plain = config.reference().model_copy(update={"name": "", "run": type(config.run)()})
        key = f"{move.__name__} {plain.model_dump_json()}", pickle.dumps(subject)
        with self._lock:
            if key not in self._known:
                work = config.reference(), move, subject
                runs, rows = self._world(1, _runs, *work, timeout=config.run.timeout)[0]
                self._known[key] = _reference(runs, rows, config.train.dtype)
            return self._known[key]


def _runs(
    member: Member, config: Config, move: Callable[[Trainer], None], subject: Subject | None
) -> tuple[list[Capture], list[RowLoss]]:
    """The training, its sums in another order, and below float64 from neighbouring parameters; and each row's loss."""
    losses: list[RowLoss] = []
    batch = config.train.batch  # row by row; or all at once, if row by row is how it is
    rows = config.train.model_copy(update={"microbatches": batch if config.train.microbatches < batch else 1})
    runs = [
        capture(member, config, lambda trainer: losses.extend(_row_losses(trainer)), subject),
        capture(member, config.model_copy(update={"train": rows}), None, subject),
    ]
    if config.train.dtype != "float64":
        runs.append(capture(member, config, move, subject))
    return runs, losses


@torch.no_grad()
def _row_losses(trainer: Trainer) -> list[RowLoss]:
    """Each row's loss in the first step."""
    batch, program = trainer.batch(), trainer.program
    kept = {buffer: buffer.clone() for buffer in program.model.buffers()}
    program.model.train()
    losses = [(training_loss(program, row).item(), row.valid) for row in batch.split_rows(len(batch.rows))]
    for buffer, value in kept.items():
        buffer.copy_(value)
    return losses


@torch.no_grad()
def nudge(trainer: Trainer) -> None:
    """Move every parameter by one unit in the last place, up or down in turn."""
    for param in trainer.program.parameters.values():
        signs = torch.ones(param.numel(), dtype=param.dtype)
        signs[::2] = -1
        param.mul_(1 + torch.finfo(param.dtype).eps * signs.view_as(param))


@torch.no_grad()
def round_off(trainer: Trainer) -> None:
    """Move every parameter to the nearest bfloat16."""
    for param in trainer.program.parameters.values():
        param.copy_(param.bfloat16())


def _reference(runs: Sequence[Capture], rows: list[RowLoss], dtype: str) -> Reference:
    grads, params, buffers = ([_wholes(run, kind) for run in runs] for kind in ("gradients", "parameters", "buffers"))
    eps = torch.finfo(getattr(torch, dtype)).eps
    floors, amplified = [], 0.0
    for step, (first, *others) in enumerate(zip(*grads, strict=True)):
        noise = functools.reduce(_larger, [spread(first, other) for other in others])
        floors.append({name: value / (FLOOR * eps) for name, value in noise.items()})
        sizes = {name: max(value.abs().max().item(), floors[step][name]) or 1.0 for name, value in first.items()}
        amplified = max(amplified, *(noise[name] / sizes[name] for name in first))
    tolerance = EXACT if dtype == "float64" else MARGIN * amplified
    return Reference(runs[0], grads[0], params[0], buffers[0], floors, tolerance, rows)


def _wholes(run: Capture, kind: str) -> list[dict[str, Tensor]]:
    return [{name: whole.value for name, whole in step.items()} for step in assemble([getattr(run, kind)])]


def _larger(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: max(value, other[name]) for name, value in one.items()}
