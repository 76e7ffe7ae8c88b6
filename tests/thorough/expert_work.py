"""What launched ranks do in test_expert.py. Imports of pytest stay outside."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sandbox.config import Config
from sandbox.data import Corpus
from sandbox.mesh import Mesh
from sandbox.model import mixtures
from sandbox.recorder import Recorder
from sandbox.runtime import Member
from sandbox.trainer import Trainer


@dataclass
class Routed:
    """What one rank's routers decided in a step, and what the rank sent."""

    place: int  # along ep
    chosen: list[list[int]] = field(default_factory=list)  # tokens of each expert, by mixture and microbatch
    sent: dict[str, float] = field(default_factory=dict)


def one_step(member: Member, config: Config) -> Routed:
    """Gradients of one step, with what was routed and what was sent."""
    recorder = Recorder()
    mesh = Mesh(config.mesh.degrees, member.rank, "cpu", recorder)
    trainer = Trainer(config, mesh, torch.device("cpu"), Corpus.load(config.data, config.model.vocab))
    found = Routed(mesh.axis("ep").rank)
    for moe in mixtures(trainer.program.model):
        route = moe.route

        def note(*args: Any, route: Callable[..., tuple[Tensor, Tensor]] = route) -> tuple[Tensor, Tensor]:
            weights, chosen = route(*args)
            found.chosen.append(chosen.flatten().bincount(minlength=config.model.experts).tolist())
            return weights, chosen

        moe.route = note  # type: ignore[method-assign]
    trainer.compute_gradients(trainer.batch())
    found.sent = dict(recorder.sent)
    return found


def to_two_experts(trainer: Trainer) -> None:
    """All tokens go to the first two experts."""
    for moe in mixtures(trainer.program.model):
        moe.router.register_forward_hook(lambda module, args, out: out - 1e3 * (torch.arange(out.shape[-1]) > 1))


def sent_four_times(trainer: Trainer) -> None:
    """Whatever travels to experts is recorded four times."""
    launch = trainer.mesh.recorder.launch
    trainer.mesh.recorder.launch = (  # type: ignore[method-assign]
        lambda op, axis, sent, *tensor: launch(op, axis, sent * (4 if op == "all_to_all" else 1), *tensor)
    )
