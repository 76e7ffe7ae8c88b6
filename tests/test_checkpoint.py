"""A checkpoint goes on to the bit, refuses what does not fit, and is never half of one."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import world

from sandbox import checkpoint
from sandbox.config import Config
from sandbox.errors import CheckpointError, WorkerError
from sandbox.runtime import Member, launch
from sandbox.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
unit, parity = pytest.mark.unit, pytest.mark.parity
LAYOUTS = [
    *(("native", strategy, {}) for strategy in world.NATIVE),
    ("native", "fsdp", {"replicas": 2, "degree": 4}),
    # On 3 ranks torch's DDP would round otherwise: it cuts its buckets anew after the first step.
    *(("torch", strategy, {"degree": 2}) for strategy in ("ddp", "zero1", "fsdp")),
]


@parity
@pytest.mark.parametrize("optimizer", ["adamw", "sgd_momentum"])
@pytest.mark.parametrize(("engine", "strategy", "mesh"), LAYOUTS)
def test_a_resumed_training_goes_on_to_the_bit(
    tmp_path: Path, engine: str, strategy: str, mesh: dict[str, int], optimizer: str
) -> None:
    train = {"optimizer": optimizer, "steps": 4, "schedule": "linear"}
    config = world.config(strategy, mesh.get("degree", 3), engine=engine, mesh=mesh, train=train)
    undisturbed = launch(config.mesh.world, world.train_and_save, config, tmp_path, 2, timeout=world.TIMEOUT)
    resumed = launch(config.mesh.world, world.resume, config, tmp_path, timeout=world.TIMEOUT)
    for one, other in zip(undisturbed, resumed, strict=True):
        assert one[0] == other[0]
        assert [step for step, *_ in one[0]] == [3, 4]
        assert one[1].keys() == other[1].keys()
        assert all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())
        assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


@parity
def test_a_save_that_was_killed_is_never_taken_for_a_good_one(tmp_path: Path) -> None:
    config = world.config("zero1")
    with pytest.raises(WorkerError, match="rank 1 was killed"):
        launch(2, world.killed_in_the_second_save, config, tmp_path, timeout=world.TIMEOUT)
    assert (tmp_path / "step-000002.partial").exists(), "or it was not killed midway"
    assert checkpoint.latest(tmp_path).name == "step-000001"
    assert launch(2, world.resume, config, tmp_path, timeout=world.TIMEOUT)[0][0][0][0] == 2
    launch(2, world.train_and_save, config, tmp_path, 2, timeout=world.TIMEOUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"], "and it is cleared away"


@parity
def test_another_strategy_on_the_same_ranks_is_refused(tmp_path: Path) -> None:
    launch(2, world.train_and_save, world.config("ddp"), tmp_path, 1, timeout=world.TIMEOUT)
    with pytest.raises(
        CheckpointError, match=r"was saved with mesh .*ddp.*, this run has .*zero1.*Resume with the same mesh"
    ):
        launch(2, world.resume, world.config("zero1"), tmp_path, timeout=world.TIMEOUT)


def alone(**sections: dict[str, Any]) -> Trainer:
    return world.trainer_of(Member(), config(**sections))


def config(**sections: dict[str, Any]) -> Config:
    return world.config(world=1, model={"layers": 1, **sections.pop("model", {})}, **sections)


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return checkpoint._state(trainer)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one rank, after two steps."""
    trainer = alone()
    for _ in range(2):
        trainer.train_step()
    return checkpoint.save(trainer, tmp_path / "checkpoints")


@unit
def test_one_rank_saves_and_restores_parameters_optimizer_and_step(tmp_path: Path) -> None:
    trainer, other = alone(), alone(train={"seed": 1})
    for _ in range(2):
        trainer.train_step()
    path = checkpoint.save(trainer, tmp_path)
    assert path == checkpoint.latest(tmp_path) == tmp_path / "step-000002"
    checkpoint.restore(other, path)
    assert other.step == 2
    assert state(other).keys() == state(trainer).keys()
    assert sum("momentum" in key for key in state(other)) == len(trainer.program.parameters)
    assert all(torch.equal(tensor, state(other)[key]) for key, tensor in state(trainer).items())


@unit
def test_one_rank_saves_and_restores_without_a_warning(tmp_path: Path) -> None:
    trainer = alone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.restore(trainer, checkpoint.save(trainer, tmp_path))


@unit
def test_the_optimizers_state_is_a_copy_of_its_own(saved: Path) -> None:
    """Two restores from one checkpoint do not share memory."""
    one, other = alone(), alone()
    for trainer in (one, other):
        checkpoint.restore(trainer, saved)
    before = {key: tensor.clone() for key, tensor in state(other).items()}
    one.train_step()
    assert all(torch.equal(tensor, state(other)[key]) for key, tensor in before.items())


@unit
def test_the_newest_are_kept(tmp_path: Path) -> None:
    trainer = alone(train={"steps": 9})
    for _ in range(4):
        trainer.train_step()
        checkpoint.save(trainer, tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]


@unit
def test_saving_a_step_again_replaces_it(saved: Path) -> None:
    trainer = alone(train={"seed": 5})
    trainer.step = 2
    assert checkpoint.save(trainer, saved.parent) == saved
    checkpoint.restore(other := alone(), saved)
    assert all(torch.equal(tensor, state(other)[key]) for key, tensor in state(trainer).items())


@unit
def test_what_was_just_saved_is_kept_though_an_older_run_came_further(tmp_path: Path) -> None:
    trainer = alone(train={"steps": 9})
    for step in (7, 8):
        trainer.step = step
        checkpoint.save(trainer, tmp_path)
    trainer.step = 1
    path = checkpoint.save(trainer, tmp_path)
    assert path.exists()


@unit
def test_the_newest_is_the_one_of_the_largest_step_not_the_last_by_name(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        (folder / checkpoint.FACTS).write_text("{}")
    assert checkpoint.latest(tmp_path).name == "step-1000000"


@unit
def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            CheckpointError, match=r"holds no checkpoint\. Train with run\.checkpoint_every: N first\."
        ) as caught:
            checkpoint.latest(folder)
        assert str(caught.value).startswith(str(folder))
    (tmp_path / "step-000001.partial").mkdir()
    (tmp_path / "step-000002").mkdir()
    with pytest.raises(CheckpointError):
        checkpoint.latest(tmp_path)


@unit
@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": {"width": 32}}, "model"),
        ({"train": {"optimizer": "adamw"}}, "train.optimizer"),
        ({"train": {"dtype": "float32"}}, "train.dtype"),
        ({"engine": "torch"}, "engine"),
        ({"mesh": {"bucket_mb": 3}}, "mesh"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused(saved: Path, sections: dict[str, Any], key: str) -> None:
    trainer = alone(**sections)
    before = {name: tensor.clone() for name, tensor in state(trainer).items()}
    with pytest.raises(CheckpointError, match=f"was saved with {key} .*Resume with the same {key}"):
        checkpoint.restore(trainer, saved)
    assert trainer.step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(trainer).items())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@unit
@pytest.mark.parametrize(
    "spoil", [Path.unlink, truncate, lambda path: path.write_bytes(b"")], ids=["gone", "cut", "empty"]
)
@pytest.mark.parametrize("file", ["run.json", ".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_named(saved: Path, spoil: Callable[[Path], object], file: str) -> None:
    assert {path.name for path in saved.iterdir()} == {"run.json", ".metadata", "__0_0.distcp"}
    spoil(saved / file)
    with pytest.raises(CheckpointError, match=str(saved)):
        checkpoint.restore(alone(), saved)


@unit
def test_facts_that_say_nothing_are_no_checkpoint(saved: Path) -> None:
    (saved / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=str(saved)):
        checkpoint.restore(alone(), saved)


@unit
def test_the_facts_are_readable(saved: Path) -> None:
    facts = json.loads((saved / "run.json").read_text())
    assert facts["step"] == 2
    assert set(facts["layout"]) == {"engine", "mesh", "model", "train.optimizer", "train.dtype"}


@unit
def test_a_failed_save_leaves_the_old_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError("disk full")

    trainer = alone()
    trainer.step = 2
    monkeypatch.setattr(checkpoint.state_dict_saver, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(trainer, saved.parent)
    checkpoint.restore(alone(), checkpoint.latest(saved.parent))
