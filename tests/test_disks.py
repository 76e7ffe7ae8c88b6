"""Disks that damage a checkpoint, are slow, or stuck: what a run does about each."""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_work
import pytest
import restart_work as work
from restart_work import Blow, metrics, steps, supervised, with_run

from sandbox import run
from sandbox.config import Config
from sandbox.errors import CheckpointError, TrainingError, WorkerError

pytestmark = [pytest.mark.parity, pytest.mark.recovery]

SPOILS = (work.flipped, work.cut_short, work.emptied)
ONCE = [Blow(0, 0, "", "")]


def small(count: int = 6, **run_: Any) -> Config:
    train = {"steps": count, "optimizer": "adamw"}
    return with_run(checkpoint_work.config("tp 2", train=train), **{"checkpoint_async": False, **run_})


def warnings(folder: Path) -> list[str]:
    return [line["warning"] for line in metrics(folder) if "warning" in line]


# A damaged checkpoint


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_restart_passes_over_a_damaged_checkpoint_and_names_its_file(
    tmp_path: Path, spoil: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = small()
    undisturbed = supervised(config, tmp_path / "whole")
    capsys.readouterr()
    train = functools.partial(work.killed_by_what_also_spoils, spoil)
    assert supervised(config, tmp_path / "struck", ONCE, train=train) == undisturbed
    assert [line["run"]["from_step"] for line in metrics(tmp_path / "struck") if "run" in line][:2] == [0, 2]
    assert set(steps(tmp_path / "struck")) == set(steps(tmp_path / "whole"))

    kept = tmp_path / "struck/checkpoints"
    (warning,) = warnings(tmp_path / "struck")
    file = "run.json" if spoil is work.emptied else "__"
    assert warning.startswith(f"{kept}/step-000003/{file}")
    assert "is damaged: its checksum is not the one in SHA256SUMS." in warning
    assert warning.endswith("It is set aside as step-000003.damaged, and the run goes on from step-000002.")
    assert f"warning: {warning}" in capsys.readouterr().out
    assert {path.name for path in kept.iterdir()} == {"step-000003.damaged", "step-000005", "step-000006"}


def test_without_checksums_the_damage_would_be_in_the_losses(tmp_path: Path) -> None:
    config = small()
    undisturbed = supervised(config, tmp_path / "whole")
    try:
        loss = supervised(config, tmp_path / "struck", ONCE, train=functools.partial(work.blind, work.flipped))
    except TrainingError:
        loss = math.nan
    assert loss != pytest.approx(undisturbed, rel=1e-6)
    assert not warnings(tmp_path / "struck")


@pytest.mark.parametrize("spoil", SPOILS)
def test_autoresume_passes_over_it_too_and_resume_does_not(tmp_path: Path, spoil: Callable[[Path], Path]) -> None:
    kept = tmp_path / "run/checkpoints"
    run.start(small(3), tmp_path / "run")
    file = spoil(kept / "step-000003")
    before = sorted(path.name for path in kept.iterdir())
    with pytest.raises(CheckpointError, match=rf"{file}: is damaged.* Remove the checkpoint, and go on"):
        run.start(small(4), tmp_path / "run", resume=True)
    assert sorted(path.name for path in kept.iterdir()) == before
    loss = run.start(small(4), tmp_path / "run", autoresume=True)
    assert loss == run.start(small(4), tmp_path / "whole")
    assert [str(file) in warning for warning in warnings(tmp_path / "run")] == [True]


def test_where_all_are_damaged_the_run_ends_and_touches_none(tmp_path: Path) -> None:
    kept = tmp_path / "run/checkpoints"
    run.start(small(3), tmp_path / "run")
    files = [work.cut_short(kept / "step-000003"), work.flipped(kept / "step-000002")]
    with pytest.raises(CheckpointError) as caught:
        run.start(small(4), tmp_path / "run", autoresume=True)
    assert all(f"{file}: is damaged" in str(caught.value) for file in files)
    assert sorted(path.name for path in kept.iterdir()) == ["step-000002", "step-000003"]


# A slow disk, and a stuck one

# The ranks say the first after 4.8 s, the launcher the second after 6, if it is sooner on a machine under load.
STUCK = (
    r"Rank 1 did not read or write a byte of a checkpoint for 4\.8 s: the disk is stuck\.|"
    r"no rank made progress for 6 s\. None waits in a collective"
)


@pytest.mark.parametrize("beside", [True, False])
def test_a_slow_disk_is_waited_for(tmp_path: Path, beside: bool) -> None:
    """The save takes twice `run.timeout`, and never that long for a byte."""
    config = small(2, timeout=6, checkpoint_async=beside)
    assert supervised(config, tmp_path / "slow", ONCE, train=work.slow_disk, restarts=0) == supervised(
        config, tmp_path / "whole"
    )
    assert sorted(path.name for path in (tmp_path / "slow/checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_it_is_waited_for_because_of_the_bytes_that_it_takes(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=STUCK):
        supervised(small(2, timeout=6), tmp_path, ONCE, train=work.slow_disk_that_is_not_heard, restarts=0)


@pytest.mark.parametrize("beside", [True, False])
def test_a_stuck_disk_is_told_as_such_and_answered_with_a_restart(tmp_path: Path, beside: bool) -> None:
    config = small(4, timeout=6, checkpoint_async=beside)
    undisturbed = supervised(config, tmp_path / "whole")
    assert supervised(config, tmp_path / "stuck", ONCE, train=work.stuck_disk) == undisturbed
    first, *_ = [line["fault"] for line in metrics(tmp_path / "stuck") if "fault" in line]
    assert re.match(STUCK, first)
    if beside:  # while the training goes on, its launcher sees no hang
        assert first.startswith("Rank 1 did not")
