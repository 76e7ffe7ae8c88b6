"""Runs over several hosts that lose a rank, a link or a host: they end where they would have ended without."""

import os
import signal
import time
from pathlib import Path

import pytest
from hosts import Run, expected, hosts, needs_root, two, until

pytestmark = [pytest.mark.cluster, pytest.mark.parity, pytest.mark.timeout(600), *needs_root]


def test_a_run_outlives_its_ranks_its_links_and_the_host_of_its_first_rank(tmp_path: Path) -> None:
    """The hosts meet at a third, which keeps the store."""
    config, told = two(24), []
    undisturbed = expected(config, tmp_path / "whole")
    with hosts(3, tmp_path / "hosts") as cluster:
        run = Run(cluster, config, tmp_path / "struck", "1:2", store=2)
        run.start_store(2)
        agents = run.ready(0, 1)
        started = len(run.worlds())

        run.allow(8)
        cluster.cut(1)
        time.sleep(3)
        cluster.mend(1)
        told.append(("link mended after 3 s: next step", run.reach(8)))
        assert run.worlds()[started:] == [], "it costs time, and no restart"

        os.kill(cluster.ranks(1)[0], signal.SIGKILL)
        run.allow(12)
        told.append(("rank killed: next step", run.reach(9, started + 1)))
        run.reach(12)
        assert set(run.worlds()[started - 1 :]) == {2}
        assert run.steps() == {step: {undisturbed[step]} for step in range(1, 13)}, "to the bit"

        lost, started = cluster.node_of(0), len(run.worlds())
        run.allow(16)
        cluster.lose(lost)
        told.append(("host of rank 0 lost, with its link: next step", run.reach(13, started + 1)))
        run.reach(16)
        assert run.worlds()[-1] == 1

        started = len(run.worlds())
        cluster.mend(lost)
        back = time.monotonic()
        agents[lost] = run.start(lost)
        until(lambda: run.worlds()[started:][-1:] == [2], "both hosts")  # one that is late begins a round later
        run.allow(24)
        run.reach(17, len(run.worlds()))
        told.append(("host back: next step on both", time.monotonic() - back))
        assert [agent.wait(60) for agent in agents.values()] == [0, 0]
    print(*(f"{what} after {seconds:.1f} s" for what, seconds in told), sep="\n")
    run.agrees_with(undisturbed)


@pytest.mark.parametrize(
    ("script", "killed"),
    [("elastic.sh", 1), ("elastic.sh", 0), ("nodes.sh", 1)],
    ids=["other", "store", "fixed"],
)
def test_an_agent_that_is_killed_takes_its_ranks_along_and_the_other_goes_on_or_ends(
    tmp_path: Path, script: str, killed: int
) -> None:
    """Node 0 keeps the store here, so that without it nobody can meet again. nodes.sh never restarts by itself."""
    config, other = two(12), 1 - killed
    with hosts(2, tmp_path / "hosts") as cluster:
        elastic = script == "elastic.sh"
        nodes, restarts = ("1:2", 30) if elastic else ("2", None)
        run = Run(cluster, config, tmp_path / "struck", nodes, script=script, restarts=restarts)
        agents = run.ready(0, 1)
        started, struck = len(run.worlds()), time.monotonic()
        run.allow(12)
        os.kill(cluster.agent(killed), signal.SIGKILL)
        until(lambda: not cluster.ranks(killed), "the end of its ranks", 5)
        print(f"its ranks ended after {time.monotonic() - struck:.1f} s")
        if elastic and killed == 1:
            print(f"next step after {run.reach(5, started + 1):.1f} s, on {run.worlds()[-1]} rank")
            assert agents[other].wait(60) == 0
            run.agrees_with(expected(config, tmp_path / "whole"))
        else:
            assert agents[other].wait(60) == 1
            print(f"the other agent ended after {time.monotonic() - struck:.1f} s")
        until(lambda: not cluster.ranks(other), "the end of the other ranks", 5)
