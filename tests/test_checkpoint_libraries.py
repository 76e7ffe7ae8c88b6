"""A checkpoint of a library's engine holds all that the training needs to go on, under any other engine too."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_work as work
import pytest
import torch
import world

from sandbox import checkpoint
from sandbox.checkpoint import whole
from sandbox.engines.deepspeed import _cpu_adam
from sandbox.errors import CheckpointError
from sandbox.model import build
from sandbox.plan import get_ready, preload
from sandbox.runtime import launch, warm
from sandbox.trainer import Trainer

unit, parity, engines = pytest.mark.unit, pytest.mark.parity, pytest.mark.engines
FACTOR = 4


@pytest.fixture(scope="module")
def imported() -> None:
    warm(*preload("accelerate"), *preload("deepspeed"), *preload("fairscale"))
    offloaded = work.config("deepspeed zero3 x 3", train={"optimizer": "adamw", "dtype": "float32"})
    get_ready(offloaded)  # DeepSpeed's own AdamW is compiled


@parity
@engines
@pytest.mark.timeout(_cpu_adam.TIMEOUT)
def test_a_training_goes_on_from_library_to_library(tmp_path: Path, imported: None) -> None:
    """A step in each. What one has loaded, saved again, are the bits that the last one saved: `relay` sees to that.

    The libraries have float32 only, so the steps are held against what native layouts differ from one process by.
    """
    layouts = [*work.LIBRARIES, "deepspeed zero2 x 2"]
    native = itertools.cycle(["unsharded", "zero2 x 3", "tp 2"])
    rounding = max(work.relay([next(native) for _ in layouts], tmp_path / "native", dtype="float32"))
    assert max(work.relay(layouts, tmp_path / "libraries", dtype="float32")) <= FACTOR * rounding


@parity
@engines
@pytest.mark.timeout(_cpu_adam.TIMEOUT)
def test_deepspeed_s_own_adamw_goes_on_from_torch_s_and_torch_s_from_it(tmp_path: Path, imported: None) -> None:
    layouts, native = ["zero2 x 3", "deepspeed zero3 x 3", "tp 2"], ["zero2 x 3", "unsharded", "tp 2"]
    adamw: dict[str, Any] = {"dtype": "float32", "optimizer": "adamw", "lr": 0.003}
    rounding = max(work.relay(native, tmp_path / "native", **adamw))
    assert max(work.relay(layouts, tmp_path / "libraries", **adamw)) <= FACTOR * rounding


@parity
@engines
@pytest.mark.timeout(_cpu_adam.TIMEOUT)
def test_a_step_after_lost_moments_would_be_seen(tmp_path: Path, imported: None) -> None:
    right, wrong = work.relay(["deepspeed zero2 x 2", "zero2 x 3"], tmp_path, work.moments_dropped, dtype="float32")
    assert wrong > 100 * right


@parity
@engines
@pytest.mark.timeout(_cpu_adam.TIMEOUT)
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("deepspeed zero2 x 2", "float32"),
        ("accelerate zero3 x 2", "float32"),
        ("deepspeed zero1 x 2, tp 2", "bfloat16"),
        ("deepspeed zero3 x 3", "float32"),  # offloaded
    ],
)
def test_a_library_goes_on_from_its_own_checkpoint_to_the_bit(
    tmp_path: Path, imported: None, layout: str, dtype: str
) -> None:
    config = work.config(layout, train={"optimizer": "adamw", "steps": 4, "dtype": dtype}, model={"dropout": 0.2})
    undisturbed = launch(config.mesh.world, work.straight_on, config, tmp_path, 2, timeout=world.TIMEOUT)
    resumed = launch(config.mesh.world, work.resume, config, tmp_path, timeout=world.TIMEOUT)
    assert [step for step, *_ in undisturbed[0][0]] == [3, 4]
    torch.testing.assert_close(resumed, undisturbed, rtol=0, atol=0)
    kept = {name.rpartition("/") for name in whole.load(checkpoint.latest(tmp_path), "optimizer/")}
    names = {name for name, *_ in kept}
    assert len(kept) == 3 * len(names)
    assert names == {f"optimizer/{name}" for name, _ in build(config.model, dtype).named_parameters()}


def by_another_tensor(trainer: Trainer) -> None:
    """As by flat ranges."""
    state = trainer.optimizer.state
    state[torch.zeros(3)] = state.pop(next(iter(state)))


def not_of_every_parameter(trainer: Trainer) -> None:
    trainer.optimizer.state.popitem()


def in_groups_of_its_own(trainer: Trainer) -> None:
    trainer.optimizer.state.clear()
    trainer.optimizer.param_groups[0]["params"] = [torch.zeros(3)]


@unit
@pytest.mark.parametrize("keep", [by_another_tensor, not_of_every_parameter, in_groups_of_its_own])
def test_state_that_no_parameter_claims_is_never_lost_in_silence(
    tmp_path: Path, keep: Callable[[Trainer], Any]
) -> None:
    trainer = work.one()
    trainer.train_step()
    keep(trainer)
    with pytest.raises(CheckpointError, match=r"optimizer keeps .* by other tensors than the parameters"):
        checkpoint.save(trainer, tmp_path)
    assert checkpoint.newest(tmp_path) is None
