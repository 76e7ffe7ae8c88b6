"""Bugs that really happened, planted on purpose: each must be caught, with its kind of cause, and its twin must hold.

A fault is a function that tampers with a rank's trainer before it starts; every case has fresh processes, so it may
patch what it likes. `number` is its place in the table of docs/faults.md, `source` the report of one who had it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sandbox.batch import Batch
from sandbox.comm import Axis, Pending
from sandbox.program import Program, training_loss
from sandbox.recorder import Event
from sandbox.trainer import Trainer
from sandbox.verdict import Verdict
from sandbox.verify.cases import alone
from sandbox.verify.verifier import Case

__all__ = ["FAULTS", "Fault", "at_once", "change", "change_loss", "clip_by_own_norm", "fault", "patch"]

Plant = Callable[[Trainer], Any]


@dataclass(frozen=True)
class Fault:
    """A planted bug: where it is planted, and the kind of cause that the verdict must name."""

    name: str
    number: int
    source: str
    kind: str
    plant: Plant
    strategy: str
    world: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    engine: str = "native"

    def sick(self) -> Case:
        """The case with the bug, of its name."""
        clean = self.clean()
        name = f"{clean.config.name}, {self.name}"
        return replace(clean, config=clean.config.model_copy(update={"name": name}), prepare=self.plant)

    def caught(self, verdict: Verdict) -> bool:
        """Whether the sick case's verdict is a mismatch of the right kind."""
        return verdict.status == "mismatch" and verdict.cause.split(":")[0] == self.kind

    def clean(self) -> Case:
        """The same case without it, which is equal for bugs that are planted in the same case."""
        return alone(self.engine, self.strategy, self.world, "", **self.settings)


FAULTS: dict[str, Fault] = {}


def fault(
    number: int, source: str, kind: str, strategy: str, world: int = 2, engine: str = "native", **settings: Any
) -> Callable[[Plant], Plant]:
    """Register the function below as a fault of that name."""

    def register(plant: Plant) -> Plant:
        name = getattr(plant, "__name__", "")
        address = f"https://github.com/{source}"
        FAULTS[name] = Fault(name, number, address, kind, plant, strategy, world, settings, engine)
        return plant

    return register


def patch(owner: object, name: str, value: object) -> None:
    """Put `value` in the place of an attribute of a module, class or object."""
    setattr(owner, name, value)


def at_once(axis: Axis, result: Callable[[], Tensor]) -> Pending:
    """What a collective returns, for one that sends nothing of its own."""
    return Pending(axis, Event(0, "", "", 0, 0.0), (), result)


def change(trainer: Trainer, **slots: Any) -> None:
    """Put other functions into slots of the trainer's program."""
    trainer.program = replace(trainer.program, **slots)


def change_loss(trainer: Trainer, normalise: Callable[[Tensor, Batch, float], Tensor]) -> None:
    """Run microbatches as the program does, but with another scale for each loss."""

    def forward_backward(program: Program, batches: list[Batch], valid: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for number, batch in enumerate(batches, 1):
            program.begin(number == len(batches))
            loss = normalise(training_loss(program, batch), batch, valid)
            loss.backward()
            program.reduce_grads()
            total += loss.detach()
        return total

    change(trainer, forward_backward=forward_backward)


def clip_by_own_norm(trainer: Trainer) -> None:
    """Let each rank clip by the norm of what it holds, as torch does for a model that it takes to be whole."""

    def own(program: Program, most: float | None) -> Tensor:
        norm: Tensor = torch.nn.utils.clip_grad_norm_(program.parameters.values(), most or 1e9, foreach=True)
        return norm.double()

    change(trainer, clip=own)
