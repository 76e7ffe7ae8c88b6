"""Hosts that tests strike: each can lose a process, all of its processes, or its link, and get it back.

`launch/cluster/cluster.sh` makes them, and takes them away when this process ends.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import checkpoint_work
import pytest
import restart_work
import world
import yaml

from sandbox.config import Config

__all__ = ["ROOT", "TIMEOUT", "Hosts", "Run", "expected", "hosts", "needs_root", "two", "until"]

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "launch/cluster/cluster.sh"

needs_root = [
    pytest.mark.skipif(os.geteuid() != 0, reason="an emulated cluster needs root: it makes network namespaces"),
    pytest.mark.skipif(not shutil.which("tc"), reason="an emulated cluster needs ip and tc, of iproute2"),
]

T = TypeVar("T")


def until(seen: Callable[[], T], what: str, seconds: float = 150) -> T:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := seen():
            return found
        time.sleep(0.02)
    pytest.fail(f"it never came in {seconds:g} s: {what}")


@dataclass
class Hosts:
    """`folder` gets what each command says, in a file `NODE-NUMBER.log`."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    commands: "list[tuple[int, subprocess.Popen[bytes]]]" = field(default_factory=list)

    def start(self, node: int, *command: object, **variables: object) -> "subprocess.Popen[bytes]":
        """Start a command there. It ends when the cluster does."""
        into = ["nsenter", f"--target={self._holder(node)}", "--net", "--mount", "--uts", "--pid", f"--wd={ROOT}"]
        there = {"NODE": node, "HOSTS": self.mark, "HOST": "node0", "ADDRESS": f"10.77.0.{node + 1}", **variables}
        with (self.folder / f"{node}-{len(self.commands)}.log").open("wb") as log:
            running = subprocess.Popen(
                [*into, "--", *map(str, command)],
                env=os.environ | {name: str(value) for name, value in there.items()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.commands.append((node, running))
        return running

    def processes(self, node: int, *also: str) -> list[int]:
        """Those on the node, with all of `also` in their environment."""
        return [pid for pid, environ in self._environments() if all(w in environ for w in (f"\0NODE={node}\0", *also))]

    def ranks(self, node: int) -> list[int]:
        return self.processes(node, "\0LOCAL_RANK=")

    def agent(self, node: int) -> int:
        """The process of torchrun there."""
        ranks = self.ranks(node)
        (found,) = [
            pid
            for pid in self.processes(node)
            if pid not in ranks and b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return found

    def node_of(self, rank: int) -> int:
        return next(node for node in range(8) if self.processes(node, f"\0RANK={rank}\0"))

    def lose(self, node: int) -> None:
        """As when somebody pulls all of its plugs: nothing that it still says arrives."""
        self.cut(node)
        holder = self._holder(node)
        for pid in self.processes(node):
            if pid != holder:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def cut(self, node: int, *, mend: bool = False) -> None:
        """The cable between the node and the others: the node sees that it has no carrier."""
        outside = ["nsenter", f"--target={_parent(self._holder(node))}", "--net"]
        subprocess.run([*outside, "ip", "link", "set", f"port{node}", "up" if mend else "down"], check=True)

    def mend(self, node: int) -> None:
        self.cut(node, mend=True)

    def log(self) -> str:
        """All that was said, for a test that failed."""
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def _holder(self, node: int) -> int:
        return min(self.processes(node, "\0HOLDER=1\0"))

    def _environments(self) -> Iterator[tuple[int, str]]:
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                environ = f"\0{path.read_text(errors='replace')}"
                if self.mark in environ:
                    yield int(path.parent.name), environ


def _parent(pid: int) -> int:
    (found,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("PPid:")]
    return int(found.split()[1])


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[Hosts]:
    """So many hosts, and if the test fails, what was said on them."""
    found = Hosts(folder)
    folder.mkdir()
    holder = [CLUSTER, "-n", str(count), "sh", "-c", "echo; HOLDER=1 exec sleep infinity"]
    environment = os.environ | {"HOSTS": found.mark}
    with subprocess.Popen(holder, env=environment, stdout=subprocess.PIPE, text=True) as cluster:
        try:
            assert cluster.stdout
            for _ in range(count):
                cluster.stdout.readline()
            until(lambda: all(found.processes(node, "\0HOLDER=1\0") for node in range(count)), "hosts", 20)
            yield found
        except BaseException:
            print(found.log())
            raise
        finally:
            cluster.kill()
            for _, command in found.commands:
                command.wait()


TIMEOUT = 15
"""Of runs over hosts, in s: two processes on a machine under load may come to a collective as far apart."""


def two(count: int) -> Config:
    """Of two ranks, and steps so small that what is measured is the restart."""
    layout = checkpoint_work.config(train={"steps": count, "optimizer": "adamw"}, model={"dropout": 0.1})
    dp = {"dp": {"degree": 2, "strategy": "zero1", "bucket_mb": 0.005}}
    return restart_work.with_run(Config.model_validate({**layout.model_dump(), "mesh": dp}), timeout=TIMEOUT)


def expected(config: Config, folder: Path) -> dict[int, tuple[float, float]]:
    """Step -> (loss, norm) of the run that nothing befalls, on this machine."""
    restart_work.supervised(config, folder)
    return dict(restart_work.steps(folder))


@dataclass
class Run:
    """A config that ranks on several hosts train by launch/elastic.sh, no further than the test allows.

    `store`: the host that keeps what nodes say where they meet. If it is none of the nodes, that is `start_store`'s.
    """

    hosts: Hosts
    config: Config
    folder: Path
    nodes: str
    store: int = 0
    script: str = "elastic.sh"
    restarts: int | None = 30
    pace: float = 0.05

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.results, self.path, self.gate = self.folder / "run", self.folder / "config.yaml", self.folder / "gate"
        self.path.write_text(yaml.safe_dump(self.config.model_dump(mode="json")))
        self.allow(0)
        torchrun = self.folder / "torchrun"
        torchrun.write_text(
            '#!/bin/bash\nfor word; do shift; [ "$word" = sandbox ] && word=paced; set -- "$@" "$word"; done\n'
            f'exec {sys.executable} -m torch.distributed.run "$@"\n'
        )
        torchrun.chmod(0o755)

    def start(self, node: int) -> "subprocess.Popen[bytes]":
        settings: dict[str, object] = {
            "HOST": f"node{self.store}",
            "NODES": self.nodes,
            "GPUS": 1,
            "RESTARTS": "" if self.restarts is None else self.restarts,
            "WAIT": 60,
            "GATE": self.gate,
            "PACE": self.pace,
            "PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
            "PYTHONWARNINGS": "ignore",
        }
        command = [
            ROOT / "launch" / self.script,
            self.path,
            "--folder",
            self.results,
            "--autoresume",
            "--min-ranks",
            "1",
        ]
        return self.hosts.start(node, *command, **settings)

    def start_store(self, node: int) -> None:
        """Keep the store there, in a process of its own."""
        said = self.hosts.folder / f"{node}-{len(self.hosts.commands)}.log"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.hosts.start(node, ROOT / "launch/store.sh", PATH=path)
        until(lambda: "nodes can meet at port 29500" in said.read_text(), "the store")

    def allow(self, step: int) -> None:
        new = self.gate.with_suffix(".new")
        new.write_text(str(step))
        new.rename(self.gate)

    def lines(self) -> list[dict[str, Any]]:
        return restart_work.metrics(self.results) if (self.results / "metrics.jsonl").exists() else []

    def worlds(self) -> list[int]:
        """The number of ranks of each start."""
        return [line["run"]["world"] for line in self.lines() if "run" in line]

    def ready(self, *nodes: int) -> "dict[int, subprocess.Popen[bytes]]":
        """Start on the nodes, and train four steps -> their agents."""
        agents = {node: self.start(node) for node in nodes}
        until(lambda: self.worlds()[-1:] == [len(nodes)], "all nodes")  # the first to come may have begun without them
        self.allow(4)
        self.reach(4)
        return agents

    def reach(self, step: int, starts: int = 1, seconds: float = 150) -> float:
        """Wait for a step made since the world was started so often -> the seconds that it took."""
        begun = time.monotonic()

        def there() -> bool:
            lines, count = self.lines(), 0
            for line in lines:
                count += "run" in line
                if count >= starts and line.get("step", 0) >= step and "loss" in line:
                    return True
            return False

        until(there, f"step {step} of start {starts}", seconds)
        return time.monotonic() - begun

    def steps(self) -> dict[int, set[tuple[float, float]]]:
        """Step -> all (loss, norm) that it was seen with."""
        found: dict[int, set[tuple[float, float]]] = {}
        for step, values in restart_work.steps(self.results):
            found.setdefault(step, set()).add(values)
        return found

    def agrees_with(self, undisturbed: Mapping[int, tuple[float, float]]) -> None:
        """See that every step was made, each time as if nothing had happened."""
        found = self.steps()
        assert found.keys() == undisturbed.keys()
        for step, seen in found.items():
            for values in seen:
                assert values == pytest.approx(undisturbed[step], rel=world.EXACT), step
