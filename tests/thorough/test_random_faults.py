"""More of tests/test_restarts.py: fifty random faults in a run of a hundred steps."""

from pathlib import Path

import checkpoint_work
import pytest
from restart_work import drawn, metrics, steps, supervised, with_run

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]

FAULTS = 50


@pytest.mark.parametrize(("layout", "seed"), [("zero1 x 3", 0), ("pp 2 in zero3 x 2", 1), ("torch fsdp x 3", 2)])
def test_after_fifty_faults_the_run_ends_as_if_nothing_had_happened(tmp_path: Path, layout: str, seed: int) -> None:
    train = {"steps": 100, "optimizer": "adamw", "eval_every": 25}
    config = with_run(checkpoint_work.config(layout, train=train, model={"layers": 2, "dropout": 0.1}))
    undisturbed = supervised(config, tmp_path / "whole")
    assert supervised(config, tmp_path / "struck", drawn(seed, FAULTS)) == undisturbed
    assert set(steps(tmp_path / "struck")) == set(steps(tmp_path / "whole"))
    assert sum("fault" in line for line in metrics(tmp_path / "struck")) >= FAULTS
