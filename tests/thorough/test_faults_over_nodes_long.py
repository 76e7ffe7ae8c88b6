"""More of tests/cluster/test_faults_over_nodes.py: what takes torchrun half a minute to see, and faults at random."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hosts import TIMEOUT, Run, expected, hosts, needs_root, two, until

pytestmark = [pytest.mark.parity, pytest.mark.timeout(3600), *needs_root]


def test_a_stopped_rank_costs_the_timeout_and_the_half_minute_that_torchrun_asks_it_to_end(tmp_path: Path) -> None:
    config = two(12)
    with hosts(2, tmp_path / "hosts") as cluster:
        run = Run(cluster, config, tmp_path / "struck", "1:2")
        agents = run.ready(0, 1)
        started = len(run.worlds())
        run.allow(12)
        os.kill(cluster.ranks(1)[0], signal.SIGSTOP)
        seconds = run.reach(5, started + 1)
        print(f"rank stopped: next step after {seconds:.1f} s")
        assert seconds > TIMEOUT
        waits = r"Rank \d \(silent\) never arrived: the others wait in #\d+ (.* over dp_shard|checkpoint over world)\."
        assert re.search(waits, cluster.log())
        assert "does not answer: stopped, dead or cut off. It was last seen" in cluster.log()
        assert [agent.wait(120) for agent in agents.values()] == [0, 0]
    run.agrees_with(expected(config, tmp_path / "whole"))


@pytest.mark.parametrize("mended", [False, True])
def test_a_link_that_is_cut_for_good_leaves_one_side_at_work_and_the_other_waits_for_it(
    tmp_path: Path, mended: bool
) -> None:
    """The isolated agent waits as long as its kernel tries to reach the store: so long the node may come back."""
    config = two(24)
    with hosts(2, tmp_path / "hosts") as cluster:
        run = Run(cluster, config, tmp_path / "struck", "1:2")
        agents = run.ready(0, 1)
        if not mended:
            there = ["nsenter", f"--target={cluster.agent(1)}", "--net", "--"]
            subprocess.run([*there, "sh", "-c", "echo 5 >/proc/sys/net/ipv4/tcp_retries2"], check=True)
        started, cut = len(run.worlds()), time.monotonic()
        run.allow(16)
        cluster.cut(1)
        until(lambda: not cluster.ranks(1), "the end of the isolated rank")
        print(f"the isolated rank ended after {time.monotonic() - cut:.1f} s")
        run.reach(5, started + 1)
        print(f"link cut: next step after {time.monotonic() - cut:.1f} s")
        assert run.worlds()[-1] == 1
        if mended:
            run.reach(16)
            cluster.mend(1)
            back = time.monotonic()
            until(lambda: run.worlds()[-1] == 2, "the node is back")
            print(f"link mended: both start again after {time.monotonic() - back:.1f} s")
            run.allow(24)
            assert [agent.wait(120) for agent in agents.values()] == [0, 0]
        else:
            run.allow(24)
            assert agents[0].wait(120) == 0
            assert agents[1].wait(300) != 0
            print(f"the isolated agent ended after {time.monotonic() - cut:.1f} s")
    run.agrees_with(expected(config, tmp_path / "whole"))


def test_after_random_faults_on_either_host_the_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Ranks killed one by one and all at once, and links that are cut for a second, all at any moment."""
    count, draw, seconds = pytestconfig.getoption("faults"), random.Random(0), []
    config = two(2 * count + 2)
    undisturbed = expected(config, tmp_path / "whole")
    with hosts(2, tmp_path / "hosts") as cluster:
        run = Run(cluster, config, tmp_path / "struck", "2", restarts=4 * count)
        run.start_store(0)  # beside an agent, which is to find the port taken and connect there
        agents = [run.start(node) for node in (0, 1)]
        for fault in range(count):
            run.allow(2 * fault + 2)
            run.reach(2 * fault + 1)
            time.sleep(draw.uniform(0, 0.3))
            kind, started = draw.choice(("one", "one", "all", "link")), len(run.worlds())
            if kind == "link":
                node = draw.choice((0, 1))
                cluster.cut(node)
                time.sleep(1)
                cluster.mend(node)
                continue
            struck = [draw.choice((0, 1))] if kind == "one" else [0, 1]
            for rank in [rank for node in struck for rank in cluster.ranks(node)]:
                os.kill(rank, signal.SIGKILL)
            run.allow(2 * fault + 3)
            seconds.append(run.reach(0, started + 1))
        run.allow(2 * count + 2)
        assert [agent.wait(120) for agent in agents] == [0, 0]
    seconds.sort()
    print(f"{len(seconds)} restarts; next step after {seconds[len(seconds) // 2]:.1f} s, at most {seconds[-1]:.1f} s")
    assert run.steps() == {step: {values} for step, values in undisturbed.items()}, "to the bit"
