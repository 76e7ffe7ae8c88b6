"""More of tests/test_restarts.py: fifty random faults in a run of a hundred steps, or --faults."""

from pathlib import Path

import checkpoint_work
import pytest
from restart_work import drawn, metrics, steps, supervised, with_run

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(("layout", "seed"), [("zero1 x 3", 0), ("pp 2 in zero3 x 2", 1), ("torch fsdp x 3", 2)])
def test_after_random_faults_the_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, pytestconfig: pytest.Config, layout: str, seed: int
) -> None:
    count = pytestconfig.getoption("faults")
    train = {"steps": 2 * count, "optimizer": "adamw", "eval_every": 25}
    config = with_run(checkpoint_work.config(layout, train=train, model={"layers": 2, "dropout": 0.1}))
    undisturbed = supervised(config, tmp_path / "whole")
    assert supervised(config, tmp_path / "struck", drawn(seed, count)) == undisturbed
    assert set(steps(tmp_path / "struck")) == set(steps(tmp_path / "whole"))
    told = metrics(tmp_path / "struck")
    assert sum("fault" in line for line in told) >= count
    seconds = sorted(line["seconds"] for line in told if {"restart", "seconds"} <= set(line))
    print(f"{len(seconds)} restarts; next step after {seconds[len(seconds) // 2]:.2f} s, at most {seconds[-1]:.2f} s")
