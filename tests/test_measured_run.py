"""The step that a run measures of itself: it changes no number, says what theory says, and tells when that is wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import world
from torch import Tensor

from sandbox.batch import Batch
from sandbox.comm import all_reduce
from sandbox.config import Config
from sandbox.measure import METRICS, Figures, measured_run, timed
from sandbox.report import html, words
from sandbox.report.record import RunRecord
from sandbox.runtime import Member, launch
from sandbox.trainer import Trainer
from sandbox.verdict import Measured, Verdicts

parity = pytest.mark.parity

TIMES = "\N{MULTIPLICATION SIGN}"

Run = tuple[list[tuple[float, float, float]], dict[int, Measured]]

WORLDS = {
    "unsharded": world.config(world=1),
    "zero2": world.config("zero2"),
    "zero3": world.config("zero3"),
    "torch fsdp": world.config("fsdp", engine="torch"),
    "pipeline": world.config(world=1).model_copy(
        update={"mesh": type(world.config().mesh).model_validate({"pp": {"degree": 2}})}
    ),
}


def run(member: Member, config: Config, prepare: world.Prepare | None = None, made: int = 0) -> Run:
    """Loss, norm and rate of each step, and by step what was measured; `made` steps were made before the start."""
    trainer = world.trainer_of(member, config)
    if prepare:
        prepare(trainer)
    for _ in range(made):
        trainer.train_step()
    both = list(measured_run(trainer))
    return (
        [(step.loss, step.grad_norm, step.lr) for step, _ in both],
        {step.step: measured for step, measured in both if measured},
    )


def of_steps(config: Config, steps: int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def nudged_while_timed(trainer: Trainer) -> None:
    """Where a step is timed, its loss is another one in the last place."""
    compute = trainer.compute_gradients

    def nudged(batch: Batch) -> Tensor:
        loss = compute(batch)
        return torch.nextafter(loss, 2 * loss) if trainer.mesh.recorder.detailed else loss

    trainer.compute_gradients = nudged  # type: ignore[method-assign]


def reduced_again(trainer: Trainer) -> None:
    """Every gradient is sent once more, to no effect."""
    clip = trainer.program.clip

    def again(*args: object) -> Tensor:
        for param in trainer.program.parameters.values():
            assert param.grad is not None
            all_reduce(param.grad.clone(), trainer.mesh.axis("dp_shard")).wait()
        return clip(*args)  # type: ignore[arg-type]

    trainer.program = replace(trainer.program, clip=again)


@parity
@pytest.mark.parametrize("config", WORLDS.values(), ids=WORLDS)
def test_a_run_measures_one_step_as_theory_says_and_changes_no_bit(config: Config) -> None:
    config = of_steps(config, 4)
    expected, *_ = launch(config.mesh.world, world.steps_and_validation, config, timeout=world.TIMEOUT)
    (steps, measured), *others = launch(config.mesh.world, run, config, timeout=world.TIMEOUT)
    assert steps == expected[0]
    assert list(measured) == [3]
    assert not any(found for _, found in others), "the first rank has what all have measured"
    found = measured[3]
    assert words.factor(found.memory.values()) == "1"
    assert words.factor(found.traffic.values()) == ("1" if config.mesh.world > 1 else words.NONE)
    assert len(found.timeline) == len(found.peak) == config.mesh.world
    for rank, (spans, peak) in enumerate(zip(found.timeline, found.peak, strict=True)):
        assert peak > sum(amount.measured[rank] for amount in found.memory.values()) > 0
        assert any(span.name.startswith("backward") for span in spans)
        drawn = {span.name for span in spans if span.lane == "collective"}
        told = " ".join(found.unmeasured)
        sent = {key for key, amount in found.traffic.items() if amount.measured[rank]}
        assert all(key in drawn or key.split()[0] in told for key in sent), "drawn, or told to be missing"


@pytest.mark.unit
def test_on_a_gpu_there_is_no_timeline_and_that_is_told() -> None:
    trainer, figures = world.trainer_of(Member(), world.config(world=1)), Figures()
    trainer.device = torch.device("cuda")
    with timed(trainer, figures):
        trainer.mesh.recorder.launch("all_reduce", "dp_shard", 8)
    (told,) = figures.unmeasured
    assert told.startswith("No timeline")
    assert (figures.spans, figures.traffic) == ([], {"all_reduce dp_shard": 8})


@parity
def test_measuring_that_does_change_a_number_would_be_seen() -> None:
    (expected, _), (nudged, _) = (
        launch(2, run, world.config(), prepare, timeout=world.TIMEOUT)[0] for prepare in (None, nudged_while_timed)
    )
    assert nudged[:2] == expected[:2]
    assert nudged[2] != expected[2]


@parity
@pytest.mark.parametrize(("steps", "made", "measured"), [(1, 0, 1), (2, 0, 2), (5, 3, 5), (3, 3, None)])
def test_a_start_of_fewer_steps_measures_its_last(steps: int, made: int, measured: int | None) -> None:
    """Of a pipeline: in its first step ranks tell each other what no formula is about."""
    config = of_steps(WORLDS["pipeline"], steps)
    (_, found), _ = launch(2, run, config, None, made, timeout=world.TIMEOUT)
    assert list(found) == ([measured] if measured else [])
    assert all(words.factor(one.traffic.values()) == "1" and min(one.peak) for one in found.values())


@parity
def test_a_collective_sent_twice_is_told_on_the_page(tmp_path: Path) -> None:
    pages = {}
    for prepare in (None, reduced_again):
        (_, found), _ = launch(2, run, world.config("ddp"), prepare, timeout=world.TIMEOUT)
        record = RunRecord(name="run", measured=found[3])
        html.write(tmp_path / "page.html", Verdicts(), runs=[record])
        pages[prepare] = (tmp_path / "page.html").read_text()
    once, twice = pages[None], pages[reduced_again]
    assert f'<span class="">{TIMES} 1</span>' in once
    assert f'<span class="off">{TIMES} 2.000</span>' in twice
    for page, factor in ((once, "1"), (twice, "2.000")):
        assert f"<dt>{factor} {TIMES}</dt><dd>bytes sent in a step, over those of theory</dd>" in page
    assert METRICS.isdisjoint(key.split()[0] for key in found[3].traffic)
