"""Runs over several hosts that lose a rank, a link or a host: they end where they would have ended without."""

import os
import signal
import time
from pathlib import Path

import checkpoint_work
import pytest
import world
from hosts import Run, hosts, needs_root, until
from restart_work import steps, supervised, with_run

from sandbox.config import Config

pytestmark = [pytest.mark.cluster, pytest.mark.parity, pytest.mark.timeout(600), *needs_root]

TIMEOUT = 15


def two(count: int) -> Config:
    """Of two ranks; a step is so small that what is measured is the restart."""
    layout = checkpoint_work.config(train={"steps": count, "optimizer": "adamw"}, model={"dropout": 0.1})
    dp = {"dp": {"degree": 2, "strategy": "zero1", "bucket_mb": 0.005}}
    return with_run(Config.model_validate({**layout.model_dump(), "mesh": dp}), timeout=TIMEOUT)


def test_a_run_outlives_its_ranks_its_links_and_the_host_of_its_first_rank(tmp_path: Path) -> None:
    """The hosts meet at a third, which keeps the store."""
    config, told = two(24), []
    supervised(config, tmp_path / "whole")
    expected = dict(steps(tmp_path / "whole"))
    with hosts(3, tmp_path / "hosts") as cluster:
        run = Run(cluster, config, tmp_path / "struck", "1:2", store=2)
        run.start_store(2)
        agents = {node: run.start(node) for node in (0, 1)}
        try:
            run.allow(4)
            run.reach(4)
            started = len(run.worlds())

            run.allow(8)
            cluster.cut(1)
            time.sleep(3)
            cluster.mend(1)
            told.append(("link cut for 3 s: after it, next step", run.reach(8)))
            assert run.worlds()[started:] == [], "it costs time, and no restart"

            os.kill(cluster.ranks(1)[0], signal.SIGKILL)
            run.allow(12)
            told.append(("rank killed: next step", run.reach(9, started + 1)))
            run.reach(12)
            assert set(run.worlds()) == {2}
            assert run.steps() == {step: {expected[step]} for step in range(1, 13)}, "to the bit"

            lost, started = cluster.node_of(0), len(run.worlds())
            run.allow(16)
            cluster.lose(lost)
            told.append(("host of rank 0 lost: next step", run.reach(13, started + 1)))
            run.reach(16)
            assert run.worlds()[-1] == 1

            started = len(run.worlds())
            cluster.mend(lost)
            agents[lost] = run.start(lost)
            until(lambda: run.worlds()[started:], "the host is back")
            run.allow(24)
            told.append(("host back: next step", run.reach(17, started + 1)))
            assert run.worlds()[-1] == 2
            assert [agent.wait(60) for agent in agents.values()] == [0, 0]
        except BaseException:
            print(cluster.log())
            raise
    print(*(f"{what} after {seconds:.1f} s" for what, seconds in told), sep="\n")
    found = run.steps()
    assert found.keys() == expected.keys()
    for step, seen in found.items():
        for values in seen:
            assert values == pytest.approx(expected[step], rel=world.EXACT)
