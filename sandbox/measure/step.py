"""One step of a training, measured on every rank and held against theory. All other steps run at full speed.

Of the steps that a start makes, the second is weighed and the third timed, since weighing takes time; where there are
fewer, the last is both. Neither changes a number of the training.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from sandbox.config import Config
from sandbox.measure.memory import Peak, held
from sandbox.measure.timeline import Timeline, align
from sandbox.measure.traffic import Traffic
from sandbox.plan import name_of, predict
from sandbox.trainer import Step, Trainer
from sandbox.verdict import Amount, Measured, Span

__all__ = ["METRICS", "Figures", "fill", "measured_run", "timed"]

METRICS = frozenset({"loss", "norm", "control", "shape"})
"""Collectives of a few bytes that report or steer rather than train; strategies do not predict them."""


@dataclass
class Figures:
    """What one rank sent and did in a step, held after it, and held at most."""

    traffic: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    peak: int = 0  # 0 is not measured
    spans: list[Span] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)  # what `spans` lacks, and why


def measured_run(trainer: Trainer) -> Iterator[tuple[Step, Measured | None]]:
    """`trainer.run()`, with what was measured beside the step that was timed: on the first rank, else None."""
    first, steps = trainer.step, trainer.config.train.steps
    weighed_step, timed_step = (min(first + after, steps) for after in (2, 3))
    figures = Figures()
    while trainer.step < steps:
        with ExitStack() as watch:
            if trainer.step + 1 == weighed_step:
                watch.enter_context(_weighed(trainer, figures))
            if trainer.step + 1 == timed_step:
                watch.enter_context(timed(trainer, figures))
            step = trainer.train_step()
        yield step, _measured(trainer, figures) if step.step == timed_step else None


@contextmanager
def timed(trainer: Trainer, figures: Figures, *, timeline: bool = True) -> Iterator[None]:
    """Within it, a step is made: fills in all of its `figures` but the peak, and without `timeline`, the spans."""
    recorder = trainer.mesh.recorder
    recorder.sent.clear()
    first = len(recorder.events)
    with ExitStack() as watch:
        if trainer.config.engine != "native":  # which sends through comm alone, and that counts by itself
            watch.enter_context(Traffic(trainer.mesh))
        if timeline and trainer.device.type == "cpu":
            figures.spans = watch.enter_context(Timeline(trainer))
        elif timeline:
            figures.unmeasured = ["No timeline: a clock here tells when a GPU was given its work, not when it did it."]
        yield
    figures.traffic = {
        key: round(sent) for key, sent in recorder.sent.items() if sent and key.split()[0] not in METRICS
    }
    figures.memory = held(trainer.program, trainer.optimizer)
    if missing := {event.op for event in recorder.events[first:] if not event.end} - METRICS:
        text = f"Not in the timeline: {', '.join(sorted(missing))}, of which {trainer.config.engine} tells no end."
        figures.unmeasured = [text]


@contextmanager
def _weighed(trainer: Trainer, figures: Figures) -> Iterator[None]:
    with Peak(trainer.program, trainer.optimizer) as peak:
        yield
    figures.peak = peak.bytes


def fill(measured: Measured, config: Config, ranks: Sequence[Figures], *, theory: bool = True) -> None:
    """Put the figures of all ranks together in `measured`; with `theory`, bytes beside what strategies predict."""
    if theory:
        predictions = predict(config)
        least = [p.least for p in predictions]
        measured.traffic = _amounts([p.traffic for p in predictions], [r.traffic for r in ranks], least)
        measured.memory = _amounts([p.memory for p in predictions], [r.memory for r in ranks], [])
    measured.peak = [rank.peak for rank in ranks if rank.peak]
    measured.timeline = align([rank.spans for rank in ranks])
    measured.unmeasured = list(dict.fromkeys(text for rank in ranks for text in rank.unmeasured))


def _amounts(
    predicted: Sequence[Mapping[str, float]],
    measured: Sequence[Mapping[str, int]],
    least: Sequence[Mapping[str, float]],
) -> dict[str, Amount]:
    keys = dict.fromkeys(key for ranks in (predicted, measured) for rank in ranks for key in rank)
    return {
        key: Amount(
            predicted=[int(r.get(key, 0)) for r in predicted],
            measured=[r.get(key, 0) for r in measured],
            least=[int(r[key]) for r in least if key in r],
        )
        for key in keys
    }


def _measured(trainer: Trainer, figures: Figures) -> Measured | None:
    """The figures of all ranks, put together on the first one."""
    config, ranks = trainer.config, _gathered(figures)
    if not ranks:
        return None
    measured = Measured(
        name=config.name,
        engine=config.engine,
        strategy=name_of(config),
        mesh=str(config.mesh),
        dtype=config.train.dtype,
        world=config.mesh.world,
        config=config.model_dump(mode="json"),
    )
    fill(measured, config, ranks)
    return measured


def _gathered(figures: Figures) -> list[Figures]:
    """Those of all ranks by rank, on the first; elsewhere none."""
    if not dist.is_initialized():
        return [figures]
    ranks: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(figures, ranks)
    return ranks or []
