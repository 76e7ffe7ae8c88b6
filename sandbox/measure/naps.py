"""What a pipeline's schedule costs when its work is known: every part of the model sleeps instead of computing.

The interpreter, its messages and its order are the real ones; only the work is not. Sleeping takes no processor, so
more ranks than cores run side by side, and what is left is the schedule: how long ranks wait for one another, and for
how long something is kept for backward.

    forward of a part      one nap
    backward               one nap for the gradient of the input, and one for those of the weights: at once, or when the
                           schedule says so, for a part is a linear, and its weight's gradient is put off as any other
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sandbox.config import Config
from sandbox.data import Corpus
from sandbox.mesh import Mesh
from sandbox.model import Transformer
from sandbox.orders import LOOPED
from sandbox.recorder import Recorder
from sandbox.runtime import Member, launch
from sandbox.schedules import Schedule, make
from sandbox.trainer import Trainer

__all__ = ["Found", "Naps", "idle", "measure", "sleep_instead"]

Span = tuple[float, float]


class Found(NamedTuple):
    """A schedule, and what was measured of it: its bubble, and the most microbatches that each rank kept."""

    schedule: Schedule
    bubble: float
    kept: list[float]


def measure(name: str, ranks: int, microbatches: int, seconds: float, steps: int = 3) -> Found:
    """Run the schedule of that name with stages that sleep for `seconds` in each action, F = B = W.

    Whatever else goes on on the machine only adds to a bubble, so the smallest of all `steps` counts. The first step,
    in which ranks tell each other the shape of what they send, does not.
    """
    schedule = make(name, ranks, microbatches, 2 if name in LOOPED else 1)
    config = Config.model_validate(
        {
            "mesh": {"pp": {"degree": ranks, "schedule": name}},
            "model": {"layers": schedule.stages - 2, "width": 4, "heads": 1},
            "data": {"sequence": 4},
            "train": {"batch": microbatches, "microbatches": microbatches},
        }
    )
    found = launch(ranks, _asleep, config, steps, seconds, timeout=config.run.timeout)
    bubbles = [idle([spans[step] for spans, _ in found]) for step in range(steps)]
    kept = [most / len(schedule.held(rank)) for rank, (_, most) in enumerate(found)]
    return Found(schedule, min(bubbles), kept)


def _asleep(member: Member, config: Config, steps: int, seconds: float) -> tuple[list[list[Span]], int]:
    """By step, when this rank slept; and how many forwards of one stage it kept at most."""
    mesh = Mesh(config.mesh.degrees, member.rank, member.device, Recorder(board=member.board))
    trainer = Trainer(config, mesh, torch.device(member.device), Corpus.load(config.data, config.model.vocab))
    naps = sleep_instead(trainer, (seconds, seconds, seconds))
    spans: list[list[Span]] = []
    for _ in range(steps + 1):
        naps.spans = []
        trainer.compute_gradients(trainer.batch())
        assert not naps.kept, "something is kept when the step is over"
        spans.append(naps.spans)
    return spans[1:], naps.most


class _Kept:
    """Lives as long as the autograd node that holds it: as long as anything of that forward is kept for backward."""


@dataclass
class Naps:
    """What a rank slept, as (start, end) on the machine's clock, and how many forwards it kept for backward at most."""

    spans: list[Span] = field(default_factory=list)
    most: int = 0
    kept: WeakSet[_Kept] = field(default_factory=WeakSet)

    def nap(self, seconds: float) -> None:
        """Sleep, and take it down."""
        start = time.perf_counter()
        time.sleep(seconds)
        self.spans.append((start, time.perf_counter()))

    def keep(self) -> _Kept:
        """A forward has happened, of which something is kept."""
        kept = _Kept()
        self.kept.add(kept)
        self.most = max(self.most, len(self.kept))
        return kept


def sleep_instead(trainer: Trainer, seconds: tuple[float, float, float]) -> Naps:
    """Put naps in the place of the parts (embedding, blocks, head) that a rank's model has.

    `seconds` of forward, backward for inputs, backward for weights. To be compared with a schedule, each stage must
    have one part: layers + 2 = stages.
    """
    naps, model = Naps(), cast(Transformer, trainer.program.model)
    width = trainer.config.model.width
    model.blocks = nn.ModuleDict({key: _Part(naps, seconds, width) for key in model.blocks})
    if model.embed is not None:
        model.embed = cast(nn.Embedding, _Part(naps, seconds, width))
    if model.head is not None:
        model.norm, model.head = nn.Identity(), cast(Any, _Part(naps, seconds, width))
    trainer.program = replace(trainer.program, loss=lambda logits, targets: logits.sum())
    return naps


def idle(ranks: Sequence[Sequence[Span]]) -> float:
    """The part of all ranks' time, from the first nap's start to the last one's end, in which they did not sleep."""
    spans = list(chain(*ranks))
    length = max(end for _, end in spans) - min(start for start, _ in spans)
    return 1 - sum(end - start for start, end in spans) / (length * len(ranks))


class _Part(nn.Module):
    def __init__(self, naps: Naps, seconds: tuple[float, float, float], width: int) -> None:
        super().__init__()
        self.naps, self.seconds, self.width = naps, seconds, width
        self.weight = nn.Parameter(torch.zeros(width, width))
        self.weight.register_post_accumulate_grad_hook(lambda _: naps.nap(seconds[2]))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        if not x.is_floating_point():  # tokens
            x = torch.zeros(*x.shape, self.width, requires_grad=torch.is_grad_enabled())
        return F.linear(_nap(x, self.naps, self.seconds), self.weight)


def _nap(*args: Any) -> Tensor:
    return cast(Tensor, _Nap.apply(*args))  # type: ignore[no-untyped-call]


class _Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, naps: Naps, seconds: tuple[float, float, float]) -> Tensor:
        ctx.naps, ctx.seconds, ctx.kept = naps, seconds[1], naps.keep()
        naps.nap(seconds[0])
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.naps.nap(ctx.seconds)
        return grad, None, None
