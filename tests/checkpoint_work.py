"""What launched ranks do in the tests of checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import world

from sandbox import checkpoint
from sandbox.config import Config
from sandbox.layout import local
from sandbox.runtime import Member
from sandbox.trainer import Trainer
from sandbox.verify.capture import Piece, Pieces

Prepare = Callable[[Trainer], Any]

# Every cut there is: boxes, ranges, whole parameters, rows, columns, stages, and some of them in one another.
LAYOUTS: dict[str, dict[str, Any]] = {
    "unsharded": {},
    "zero1 x 3": {"dp": {"degree": 3, "strategy": "zero1", "bucket_mb": 0.005}},
    "fsdp 2 x 2": {"dp": {"degree": 4, "strategy": "fsdp", "replicas": 2}},
    "tp 2": {"tp": {"degree": 2, "sequence": True}},
    "zero3 x 3": {"dp": {"degree": 3, "strategy": "zero3"}},
    "tp 3 in zero2 x 2": {"tp": {"degree": 3}, "dp": {"degree": 2, "strategy": "zero2", "bucket_mb": 0.002}},
    "torch fsdp x 3": {"engine": "torch", "dp": {"degree": 3, "strategy": "fsdp"}},
    "cp 2 in ddp x 2": {"cp": {"degree": 2}, "dp": {"degree": 2, "strategy": "ddp"}},
    "torch zero1 x 3": {"engine": "torch", "dp": {"degree": 3, "strategy": "zero1"}},
    "pp 2 in zero3 x 2": {"pp": {"degree": 2}, "dp": {"degree": 2, "strategy": "zero3"}},
    "torch ddp x 2": {"engine": "torch", "dp": {"degree": 2, "strategy": "ddp"}},
    "tp 2 in fsdp x 2 in pp 2": {"pp": {"degree": 2}, "dp": {"degree": 2, "strategy": "fsdp"}, "tp": {"degree": 2}},
}


def config(layout: str = "unsharded", **sections: dict[str, Any]) -> Config:
    """The training of `world.config`, with grouped heads and a tied head, in one of LAYOUTS."""
    mesh = dict(LAYOUTS[layout])
    engine = mesh.pop("engine", "native")
    model = {"heads": 4, "kv_heads": 2, "tied": True, **sections.pop("model", {})}
    base = world.config(world=1, engine=engine, model=model, **sections)
    return Config.model_validate({**base.model_dump(), "mesh": mesh})


def leg(member: Member, config: Config, start: Path, to: Path, steps: int = 1, tamper: Prepare | None = None) -> Any:
    """Restore the newest checkpoint of `start`, if there is one, train `steps` steps, save in `to`.

    -> of each step: loss, norm, this rank's gradients, its parameters.
    """
    trainer = world.trainer_of(member, config)
    if start.exists():
        checkpoint.restore(trainer, checkpoint.latest(start))
    if tamper:
        tamper(trainer)
    found = [step(trainer) for _ in range(steps)]
    checkpoint.save(trainer, to)
    return found


def step(trainer: Trainer) -> tuple[float, float, Pieces, Pieces]:
    loss = trainer.compute_gradients(trainer.batch()).item()
    gradients = pieces(trainer, gradients=True)
    norm = trainer.update().item()
    return loss, norm, gradients, pieces(trainer)


def pieces(trainer: Trainer, *, gradients: bool = False) -> Pieces:
    layout = trainer.program.layout
    tensors = {n: p.grad if gradients else p for n, p in trainer.program.parameters.items()}
    return {n: Piece(layout[n], local(t.detach()).clone()) for n, t in tensors.items() if t is not None}
