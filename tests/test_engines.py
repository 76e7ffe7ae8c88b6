"""All engines that are libraries: what the matrix does not run."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import world

import sandbox.program
from sandbox.config import Config
from sandbox.errors import ConfigError
from sandbox.model import mixtures
from sandbox.plan import engines, find, plan, preload, required, strategies, unsupported
from sandbox.runtime import launch, warm
from sandbox.trainer import Trainer
from sandbox.verify import Case
from sandbox.verify.cases import EVEN, EVEN_EXPERTS, EXPERTS, alone
from sandbox.verify.faults.planting import patch

CELLS = [(engine, name) for engine in engines() if required(engine) for name in strategies(engine)]


@functools.cache
def alone_in_one_process(key: str) -> object:
    return launch(1, world.steps_and_validation, Config.model_validate_json(key).reference(), timeout=world.TIMEOUT)[0]


@pytest.mark.parity
@pytest.mark.engines
@pytest.mark.parametrize(("engine", "name"), CELLS)
def test_what_is_reported_and_validated_is_that_of_the_unsharded_run(engine: str, name: str) -> None:
    warm(*preload(engine))
    config = alone(engine, name, 2, "", model=EVEN).config
    key = config.model_copy(update={"name": "", "mesh": config.reference().mesh, "engine": "native"}).model_dump_json()
    steps, validation = alone_in_one_process(key)  # type: ignore[misc]
    for found, valid in launch(2, world.steps_and_validation, config, timeout=world.TIMEOUT):
        assert [x for step in found for x in step] == pytest.approx([x for step in steps for x in step], rel=1e-5)
        assert valid == pytest.approx(validation, rel=1e-5)


@pytest.mark.unit
@pytest.mark.parametrize(("engine", "name"), CELLS)
def test_a_module_says_what_it_cuts_what_it_sends_and_where_it_comes_from(engine: str, name: str) -> None:
    text = find(engine, name).__doc__ or ""
    assert "Source: " in text
    assert "sent" in text or "Bytes sent" in text


@pytest.mark.parity
@pytest.mark.engines
@pytest.mark.parametrize("engine", [engine for engine in engines() if required(engine)])
def test_what_is_imported_for_all_ranks_says_nothing(engine: str) -> None:
    """As `sandbox verify` and `doctor` do it; DeepSpeed by itself warns that it found no GPU."""
    code = "import operator; from sandbox.runtime import *; warm(*{!r}); launch(1, operator.truth, timeout=100)"
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", code.format(preload(engine))],
        env=environment, capture_output=True, text=True, timeout=110, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.unit
@pytest.mark.parametrize("engine", engines())
def test_an_engine_has_every_strategy_or_a_reason_why_not(engine: str) -> None:
    every = {name for other in engines() for name in strategies(other)}
    assert {*strategies(engine), *unsupported(engine)} == every
    assert not {*strategies(engine)} & {*unsupported(engine)}


def weighs_more(trainer: Trainer, scale: float) -> None:
    """Rank 1's tokens count `scale` times."""
    loss = trainer.program.loss
    scale = scale if trainer.mesh.rank == 1 else 1.0
    trainer.program = replace(trainer.program, loss=lambda logits, targets: loss(logits, targets) * scale)


@pytest.mark.parity
@pytest.mark.engines
@pytest.mark.parametrize(("engine", "name"), [cell for cell in CELLS if find(*cell).AXIS == "dp"])
def test_the_measured_tolerance_is_narrow_enough_for_a_rank_that_weighs_a_little_more(engine: str, name: str) -> None:
    slightly = functools.partial(weighs_more, scale=1.0002)
    verdict = world.verifier().verify(Case(alone(engine, name, 2, "").config, slightly))
    assert verdict.status == "mismatch"


@pytest.mark.parity
@pytest.mark.engines
@pytest.mark.parametrize(("engine", "name"), [("fairscale", "zero1"), ("deepspeed", "zero2")])  # a reference each
def test_that_of_bfloat16_is_narrow_enough_for_a_rank_that_weighs_a_quarter_more(engine: str, name: str) -> None:
    verdict = world.verifier().verify(
        Case(alone(engine, name, 2, "", dtype="bfloat16").config, functools.partial(weighs_more, scale=1.25))
    )
    assert verdict.status == "mismatch"


def routers_lose_their_losses(trainer: Trainer) -> None:
    """A library's loop that takes the loss of the logits alone."""
    patch(sandbox.program, "routing_losses", lambda model: [])


def rows_count_their_own_columns(trainer: Trainer) -> None:
    """What goes to which expert is not added up over the ranks that share a row."""
    for moe in mixtures(trainer.program.model):
        moe.across = lambda counts: counts


def gates_keep_a_term_of_their_gradient(trainer: Trainer) -> None:
    """Over tp each rank has a part of every expert, and what follows from that for the gates is not added up."""
    for moe in mixtures(trainer.program.model):
        moe.weigh = lambda weights: weights


@pytest.mark.parity
@pytest.mark.engines
@pytest.mark.parametrize(
    ("engine", "name", "tamper"),
    [
        ("accelerate", "ddp", routers_lose_their_losses),
        ("deepspeed", "zero2", routers_lose_their_losses),
        ("deepspeed", "context", rows_count_their_own_columns),
        ("torch", "tensor", gates_keep_a_term_of_their_gradient),
        ("accelerate", "tensor", gates_keep_a_term_of_their_gradient),
    ],
)
def test_experts_whose_losses_are_lost_or_cut_are_found(
    engine: str, name: str, tamper: Callable[[Trainer], None]
) -> None:
    """That they are right otherwise, the matrix shows."""
    config = alone(engine, name, 2, "experts", model=EXPERTS, train={"microbatches": 4}).config
    assert world.verifier().verify(Case(config, tamper)).status == "mismatch"


@pytest.mark.unit
def test_a_library_trains_experts_or_says_why_it_cannot() -> None:
    for engine, name in CELLS:
        config = alone(engine, name, 2, "", model=EVEN_EXPERTS, train={"microbatches": 4}).config
        if (engine, name) == ("deepspeed", "pipeline"):
            with pytest.raises(ConfigError, match=r"model\.experts: .{20}"):
                plan(config)
        else:
            plan(config)


@pytest.mark.unit
def test_the_table_of_engines_has_every_strategy_of_every_engine() -> None:
    page = (Path(__file__).parents[1] / "docs" / "engines.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in page.splitlines() if line.startswith("| ")]
    held = {(strategy.partition(" ")[0], engine) for strategy, engine, count in rows if " of " in count}
    alone = {(name, engine) for engine in engines() for name in strategies(engine) if find(engine, name).AXIS != "ep"}
    assert alone <= held, "run `make picture`"
    assert all(count.split(" of ")[0] == count.split(" of ")[1] for _, _, count in rows if " of " in count)
