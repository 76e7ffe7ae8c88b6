"""Several hosts, emulated on this one: a config verified across them, and a cluster that leaves nothing behind."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "launch/cluster/cluster.sh"

pytestmark = pytest.mark.parity


def hindrance() -> str:
    """Why no cluster can be emulated here."""
    if os.geteuid() != 0:
        return "an emulated cluster needs root: it makes network namespaces"
    if absent := [tool for tool in ("ip", "tc", "unshare", "nsenter", "setpriv") if not shutil.which(tool)]:
        return f"an emulated cluster needs {', '.join(absent)} (packages iproute2 and util-linux)"
    made = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True, check=False)
    return f"an emulated cluster needs network namespaces: {made.stderr.strip()}" if made.returncode else ""


root = pytest.mark.skipif(bool(hindrance()), reason=hindrance())

# As Debian installs itself: the machine's own name is 127.0.1.1; the others are where they are.
DEBIAN = """
sed "s/.* node$NODE\\$/127.0.1.1 node$NODE/" /etc/hosts >"/mnt/hosts$NODE"
mount --bind "/mnt/hosts$NODE" /etc/hosts
"""
SMALL = ["--set", "model.layers=1", "--set", "model.width=32", "--set", "data.sequence=32"]


def cluster(*command: object, nodes: int = 2, rate: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
    speed = ["-r", rate] if rate else []
    return subprocess.run(
        [CLUSTER, "-n", str(nodes), *speed, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@root
def test_a_config_holds_across_hosts_whose_own_names_lead_nowhere() -> None:
    python = shlex.quote(sys.executable)
    say = f"{python} -c 'from sandbox.doctor.network import host_name; print(host_name(\"node0\").wrong)'"
    torchrun = f'{python} -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --local-addr "$ADDRESS"'
    meet = "--rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29500 --rdzv-conf is_host=$((1 - NODE))"
    verify = shlex.join(["sandbox", "verify", str(ROOT / "configs/hsdp.yaml"), *SMALL])
    done = cluster("bash", "-c", f"{DEBIAN}\n{say}\n{torchrun} {meet} -m {verify}", rate="100mbit")
    assert done.returncode == 0, done.stderr
    assert "1 case: 1 held" in done.stdout
    for node in range(2):
        assert f"node{node}, resolves to 127.0.1.1: the other nodes would look for it on themselves" in done.stdout


TRANSFER = """
import os, socket, time
if os.environ["NODE"] == "0":
    with socket.create_server(("10.77.0.1", 7000)) as server:
        line, _ = server.accept()
        while line.recv(1 << 16): pass
        line.sendall(b"done")
else:
    while True:
        try: line = socket.create_connection(("node0", 7000)); break
        except ConnectionRefusedError: time.sleep(0.05)
    start = time.perf_counter()
    line.sendall(bytes(5_000_000)); line.shutdown(socket.SHUT_WR); line.recv(9)
    print(time.perf_counter() - start)
"""


@root
def test_a_link_is_as_slow_as_it_was_asked_for() -> None:
    slow, fast = (float(cluster(sys.executable, "-c", TRANSFER, rate=rate).stdout) for rate in ("100mbit", ""))
    assert slow >= 0.9 * 5e6 / (100e6 / 8), "5 MB at 12.5 MB/s"
    assert fast < 0.5 * slow


@root
def test_every_host_runs_the_command_under_its_own_name() -> None:
    done = cluster("sh", "-c", 'echo "$(hostname) $NODE of $NODES at $ADDRESS meet at $HOST"', nodes=3)
    assert sorted(done.stdout.splitlines()) == [
        f"node{node} {node} of 3 at 10.77.0.{node + 1} meet at node0" for node in range(3)
    ]
    assert done.returncode == 0


@root
def test_the_first_status_that_is_not_0_ends_the_cluster() -> None:
    start = time.monotonic()
    assert cluster("sh", "-c", '[ "$NODE" = 1 ] && exit 7; sleep 60').returncode == 7
    assert time.monotonic() - start < 30


def ours(mark: str) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


@root
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_a_cluster_that_was_killed(blow: signal.Signals) -> None:
    mark, links = uuid.uuid4().hex, Path("/proc/net/dev").read_text(encoding="ascii").count("\n")
    command = [CLUSTER, "sh", "-c", "echo ready; sleep 60"]
    with subprocess.Popen(command, env=os.environ | {"MARK": mark}, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        assert running.stdout.readline() == "ready\n"
        assert len(ours(mark)) > 3
        running.send_signal(blow)
        if blow == signal.SIGINT:  # as a terminal does: to all of them
            for pid in ours(mark):
                os.kill(pid, blow)
    assert running.returncode != 0
    deadline = time.monotonic() + 10
    while ours(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not ours(mark)
    assert Path("/proc/net/dev").read_text(encoding="ascii").count("\n") == links


def test_without_root_the_reason_is_said(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    done = cluster("true", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert re.search("needs root", done.stderr)
