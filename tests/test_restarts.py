"""A run outlives its ranks, ends where it would have ended without the fault, and never restarts in vain."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_work
import pytest
import restart_work as work
import world
import yaml
from restart_work import KINDS, PHASES, Blow, metrics, steps, supervised, with_run
from traced import Traced

from sandbox import run
from sandbox.config import Config, load
from sandbox.errors import CheckpointError, ConfigError, MeshError, TrainingError, WorkerError
from sandbox.report.record import RunRecord
from sandbox.supervisor import Supervision, resized, smaller, supervise

unit, parity, pytestmark = pytest.mark.unit, pytest.mark.parity, pytest.mark.recovery


def small(layout: str = "zero1 x 3", count: int = 6, **run_: Any) -> Config:
    return with_run(checkpoint_work.config(layout, train={"steps": count, "optimizer": "adamw"}), **run_)


# When it restarts


@unit
def test_only_a_failure_of_ranks_is_answered_with_a_restart() -> None:
    ended: list[Exception] = [WorkerError("one"), WorkerError("two"), TrainingError("the loss is nan")]
    told: list[tuple[str, int]] = []

    def attempt(config: Config) -> None:
        raise ended.pop(0)

    with pytest.raises(TrainingError):
        supervise(attempt, small(), Supervision(9), lambda error, number: told.append((str(error), number)))
    assert told == [("one", 1), ("two", 2)]


@unit
def test_after_the_last_restart_the_fault_itself_is_raised() -> None:
    attempts = []

    def attempt(config: Config) -> None:
        attempts.append(config)
        raise WorkerError(f"number {len(attempts)}")

    with pytest.raises(WorkerError, match="number 3"):
        supervise(attempt, small(), Supervision(2))
    assert len(attempts) == 3


@unit
@pytest.mark.parametrize(
    ("how", "settings", "text"),
    [
        (Supervision(1), {"checkpoint_every": 0}, "--max-restarts: without checkpoints .* Set run.checkpoint_every"),
        (Supervision(1, 4), {}, r"--min-ranks 4: the mesh has 3 ranks\. Name 1 to 3\."),
        (Supervision(1, 0), {}, r"--min-ranks 0: .* Name 1 to 3\."),
        (Supervision(0, 2), {}, "--min-ranks: only a restart goes on with fewer. Say --max-restarts"),
    ],
)
def test_a_supervision_that_is_of_no_use_is_refused(
    tmp_path: Path, how: Supervision, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        run.start(small(**settings), tmp_path, supervision=how)
    assert not list(tmp_path.iterdir())


# On fewer ranks


@unit
@pytest.mark.parametrize(
    ("mesh", "train", "ranks", "expected"),
    [
        ({"dp": {"degree": 4}}, {}, 3, (3, 3)),  # of microbatches 2: 4 x 2 = 8 passes become 3 x 3
        ({"dp": {"degree": 4}}, {}, 1, (1, 8)),
        ({"dp": {"degree": 4}}, {"batch": 8}, 3, (3, 2)),  # but no pass without a row
        ({"dp": {"degree": 2}}, {}, 4, (4, 1)),  # and back
        ({"dp": {"degree": 4}, "tp": {"degree": 2}}, {}, 6, (3, 3)),
    ],
)
def test_the_data_axis_takes_the_ranks_there_are(
    mesh: dict[str, Any], train: dict[str, Any], ranks: int, expected: tuple[int, int]
) -> None:
    config = Config.model_validate({"mesh": mesh, "train": {"batch": 16, "microbatches": 2, **train}})
    changed = resized(config, ranks)
    assert (changed.mesh.dp.degree, changed.train.microbatches) == expected
    assert changed.mesh.world == ranks
    assert changed.train.batch == config.train.batch


@unit
def test_ranks_that_make_no_mesh_are_refused_and_passed_over() -> None:
    config = Config.model_validate({"mesh": {"dp": {"degree": 4, "replicas": 2}, "tp": {"degree": 2}}})
    for ranks in (7, 6, 1):  # tp takes pairs; replicas 2 of dp 3; less than tp
        with pytest.raises(MeshError, match=f"^{ranks} ranks: "):
            resized(config, ranks)
    assert smaller(config, 1).mesh.world == 4
    assert smaller(config, 5) == config


@parity
def test_a_lost_rank_is_done_without_and_the_losses_stay(tmp_path: Path) -> None:
    config = small(count=5)
    undisturbed = supervised(config, tmp_path / "whole")
    blows = [Blow(1, 1, "backward", "SIGKILL"), Blow(0, 1, "forward", "raise")]
    loss = supervised(config, tmp_path / "struck", blows, min_ranks=1)
    expected = dict(steps(tmp_path / "whole"))
    assert loss == pytest.approx(undisturbed, rel=world.EXACT)
    assert {step for step, _ in steps(tmp_path / "struck")} == {1, 2, 3, 4, 5}
    for step, values in steps(tmp_path / "struck"):
        assert values == pytest.approx(expected[step], rel=world.EXACT)
    assert [line["run"]["world"] for line in metrics(tmp_path / "struck") if "run" in line][:3] == [3, 2, 1]


# In the same layout


@parity
@pytest.mark.timeout(300)
def test_whatever_strikes_the_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each phase and each kind of fault once."""
    config = small(count=8)
    undisturbed = supervised(config, tmp_path / "whole")
    blows = [Blow(rank, 1, phase, KINDS[rank % 3]) for rank, phase in enumerate(PHASES)]
    capsys.readouterr()
    assert supervised(config, tmp_path / "struck", blows) == undisturbed
    assert set(steps(tmp_path / "struck")) == set(steps(tmp_path / "whole"))
    faults = [line["fault"] for line in metrics(tmp_path / "struck") if "fault" in line]
    assert len(faults) >= len(blows)
    for text in ("rank 0 was killed by signal 9", "Rank 1 never arrived", "rank 2 failed: RuntimeError: planted"):
        assert any(text in fault for fault in faults), text
    out = capsys.readouterr().out
    assert "restart 1: going on from step " in out
    assert "restart 1: next step " in out


@parity
def test_a_fault_before_the_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    config = small(count=3, checkpoint_every=9)
    undisturbed = supervised(config, tmp_path / "whole")
    assert supervised(config, tmp_path / "struck", [Blow(0, 2, "forward", "SIGKILL")]) == undisturbed
    assert [step for step, _ in steps(tmp_path / "struck")] == [1, 2, 1, 2, 3]


@parity
def test_a_restart_that_forgets_something_is_seen(tmp_path: Path) -> None:
    config = small(count=4)
    undisturbed = supervised(config, tmp_path / "whole")
    loss = supervised(config, tmp_path / "struck", [Blow(0, 2, "update", "SIGKILL")], train=work.forgetful)
    assert loss != pytest.approx(undisturbed, rel=1e-6)


@parity
def test_without_restarts_a_fault_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="rank 1 was killed by signal 9"):
        supervised(small(), tmp_path, [Blow(1, 1, "update", "SIGKILL")], restarts=0)
    assert [step for step, _ in steps(tmp_path)] == [1]


# What a restart does not mend


@parity
@pytest.mark.parametrize("layout", ["zero1 x 3", "tp 2"])
@pytest.mark.parametrize(
    ("train", "text"),
    [
        (
            work.not_a_number,
            r"\Astep 3: the loss is nan\. An earlier checkpoint is in the run's folder\. Lower",
        ),
        (work.unknown_token, r"\Astep 3: the batch holds token 257, but the model's are 0 to 256\. Mend the text"),
    ],
)
def test_what_would_fail_alike_again_ends_the_run(tmp_path: Path, layout: str, train: Any, text: str) -> None:
    with pytest.raises(TrainingError, match=text):
        supervised(small(layout), tmp_path, train=train, restarts=5)
    assert [step for step, _ in steps(tmp_path)] == [1, 2]
    assert not [line for line in metrics(tmp_path) if "restart" in line]


@parity
def test_a_text_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words " * 200)
    config = with_run(checkpoint_work.config(train={"steps": 3}, data={"files": (text,)}))
    text.unlink()
    with pytest.raises(ConfigError, match=r"text\.txt cannot be read"):
        supervised(config, tmp_path / "run", restarts=5)
    assert not (tmp_path / "run").exists()


@parity
@pytest.mark.parametrize("beside", [True, False])
def test_a_full_disk_is_told_and_the_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], beside: bool
) -> None:
    config = small(count=4, checkpoint_async=beside, checkpoint_keep=9)
    undisturbed = supervised(config, tmp_path / "whole")
    capsys.readouterr()
    assert supervised(config, tmp_path / "full", train=work.full_disk) == undisturbed
    kept = sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir())
    assert kept == ["step-000001", "step-000003", "step-000004"]
    (warning,) = [line["warning"] for line in metrics(tmp_path / "full") if "warning" in line]
    assert "step 2 could not be saved: on rank 2: OSError(28, 'No space left on device')" in warning
    assert "warning: " in capsys.readouterr().out


@parity
def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        supervised(small(count=2), tmp_path, train=work.full_disk)


# Under torchrun

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2", "-m", "sandbox")


def until(seen: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := seen():
            return found
        time.sleep(0.02)
    pytest.fail("it never came")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A config of two ranks, long enough to be struck."""
    path = tmp_path / "small.yaml"
    config = with_run(checkpoint_work.config("tp 2", train={"steps": 60}))
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def saved(folder: Path) -> bool:
    return len(list(folder.glob("checkpoints/step-??????"))) > 1


@parity
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun_starts_again_and_the_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, traced: Traced, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    config, folder = load(written), tmp_path / "struck"
    supervised(config, tmp_path / "whole")
    with traced.start(*TORCHRUN, "run", str(written), "--folder", str(folder), "--autoresume") as program:
        until(lambda: saved(folder))
        (worker,) = until(lambda: traced.processes("\0RANK=1\0"))
        os.kill(worker, signal.SIGKILL)
        output, errors = program.communicate()
    assert program.returncode == 0, errors
    (silence,) = [line["seconds_of_silence"] for line in metrics(folder) if "seconds_of_silence" in line]
    assert f"next step {silence:.2f} s after the last sign of life" in output
    starts = [line["run"]["from_step"] for line in metrics(folder) if "run" in line]
    assert len(starts) == 2
    assert starts[1] > 0
    assert set(steps(folder)) == set(steps(tmp_path / "whole"))
    assert [line for line in metrics(folder) if "measured" in line][-1]["step"] > starts[1]
    measured = RunRecord.read(folder).measured
    assert measured
    assert [bool(spans) for spans in measured.timeline] == [True, True]
    assert not traced.processes()


@parity
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the ranks")
def test_no_rank_outlives_torchruns_agent(
    tmp_path: Path, traced: Traced, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    folder = tmp_path / "struck"
    with traced.start(*TORCHRUN, "run", str(written), "--folder", str(folder), "--set", "train.steps=9999") as program:
        until(lambda: saved(folder))
        program.kill()
        program.communicate()
    assert traced.gone()
