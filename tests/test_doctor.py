"""The doctor says what is wrong, in words, where something is; and nothing where nothing is."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import doctor_work as work
import pytest

from sandbox.doctor import examine, network
from sandbox.doctor.collectives import exercise
from sandbox.doctor.finding import Finding
from sandbox.errors import WorkerError
from sandbox.runtime import elastic, launch
from sandbox.runtime.network import interface_towards, interfaces
from sandbox.verdict import Verdict

unit, parity = pytest.mark.unit, pytest.mark.parity
linux = pytest.mark.skipif(sys.platform != "linux", reason="interfaces are asked for as Linux does")

PROGRAM = Path(__file__).with_name("runtime_work.py")
OUTSIDE = "192.0.2.7"  # an address kept for examples


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Host name -> address, in the place of the resolver; this machine is `me`, at OUTSIDE and 127.0.0.1."""
    known: dict[str, str] = {}

    def resolve(name: str) -> str:
        if name not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return known[name]

    monkeypatch.setattr(socket, "gethostname", lambda: "me")
    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(network, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": OUTSIDE})
    monkeypatch.setattr(network, "interface_towards", {"there": "eth0"}.get)
    return known


Check = Callable[[], Finding | None]


@unit
@pytest.mark.parametrize(
    ("known", "check", "wrong"),
    [
        ({}, lambda: network.host_name(None), f"me, does not resolve .* Write `{OUTSIDE} me` into /etc/hosts"),
        ({"me": "127.0.1.1"}, lambda: network.host_name(None), ""),
        ({"me": "127.0.1.1"}, lambda: network.host_name("there"), "me, resolves to 127.0.1.1: the other nodes would"),
        ({"me": OUTSIDE}, lambda: network.host_name("there"), ""),
        ({"me": "192.0.2.8"}, lambda: network.host_name(None), "192.0.2.8, which is none of its addresses"),
        ({"there": "192.0.2.9"}, lambda: network.first_node("there"), ""),
        ({}, lambda: network.first_node("there"), "there does not resolve on this machine"),
        ({"there": "127.0.1.1"}, lambda: network.first_node("there"), "look for the rendezvous on itself"),
        ({"there": "0.0.0.0"}, lambda: network.first_node("there"), "look for the rendezvous on itself"),
        ({}, lambda: network.first_node(""), "--host is empty"),
        ({"away": "192.0.2.9"}, lambda: network.first_node("away"), "No interface of this machine leads to away"),
        ({}, lambda: network.gloo({}, "there"), ""),
        ({}, lambda: network.gloo({"GLOO_SOCKET_IFNAME": "lo"}, None), ""),
        ({}, lambda: network.gloo({"GLOO_SOCKET_IFNAME": "lo"}, "there"), "where no other node can come. .* eth0"),
        ({}, lambda: network.gloo({"GLOO_SOCKET_IFNAME": "eth1"}, None), "no interface eth1 .* There are: lo, eth0"),
        ({}, lambda: network.gloo({"GLOO_SOCKET_IFNAME": "eth0"}, "there"), ""),
        ({}, lambda: network.environment({}), ""),
        ({}, lambda: network.environment(dict.fromkeys(network.TORCHRUN, "1")), ""),
        ({}, lambda: network.environment({"RANK": "0"}), "RANK set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MAS"),
    ],
)
def test_what_is_wrong_with_the_network_is_said(
    names: dict[str, str], known: dict[str, str], check: Check, wrong: str
) -> None:
    names.update(known)
    found = check()
    said = found.wrong if found else ""
    assert re.search(wrong, said) if wrong else not said, said


@unit
@pytest.mark.parametrize("name", ["a..b", 64 * "a"])
def test_what_cannot_be_the_name_of_a_host_leads_nowhere(name: str) -> None:
    assert network.first_node(name).wrong.startswith(f"{name} does not resolve on this machine")
    assert interface_towards(name) is None


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens at."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


@unit
def test_a_port_that_is_taken_is_said(taken: int) -> None:
    assert f"Port {taken} cannot be listened at" in network.port(taken).wrong


@unit
def test_a_port_that_is_free_is_not_complained_of() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        free = other.getsockname()[1]
    assert network.port(free) == Finding("port", f"{free} is free")


@unit
def test_a_self_test_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise WorkerError("rank 0 failed: no way\nTraceback")

    monkeypatch.setattr(examine, "launch", fails)
    assert examine.collectives().wrong.endswith("did not run: rank 0 failed: no way")
    monkeypatch.setattr(examine, "launch", lambda *args, **options: [{"all-gather": ""}, {"all-gather": "is off"}])
    assert examine.collectives().wrong == "All-gather is off on rank 1."


@unit
def test_an_engine_that_does_not_hold_is_said_and_one_that_is_absent_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sick:
        def verify(self, case: object) -> Verdict:
            return Verdict(
                name="x",
                engine="x",
                strategy="ddp",
                mesh="dp 2",
                dtype="float64",
                world=2,
                status="failed",
                cause="no.",
            )

    monkeypatch.setattr(examine, "Verifier", Sick)
    monkeypatch.setattr(examine, "engines", lambda: ["native", "absent"])
    native, absent = examine.engine_states()
    assert native.wrong == "Engine native is installed, but ddp failed: no."
    assert absent == Finding("engine absent", "not installed")


@parity
def test_the_collectives_hold() -> None:
    assert all(text == "" for tests in launch(3, exercise, timeout=30) for text in tests.values())


@parity
@pytest.mark.parametrize(
    ("sick", "ranks", "name"),
    [(work.sum_for_average, {0, 1, 2}, "reduce-scatter, average"), (work.wrong_part, {0, 1, 2}, "all-to-all")],
)
def test_a_wrong_collective_is_named(sick: Callable[..., dict[str, str]], ranks: set[int], name: str) -> None:
    found = launch(3, sick, timeout=30)
    assert {r for r, tests in enumerate(found) if "is off by" in tests.pop(name)} == ranks
    assert not any(text for tests in found for text in tests.values())


@linux
@parity
@pytest.mark.cluster
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root may change the host's name")
def test_a_machine_whose_name_does_not_resolve_is_told_so_and_the_fix_is_one(tmp_path: Path, taken: int) -> None:
    doctor = f"{sys.executable} -m sandbox doctor --port {taken}"
    address = network.outward()
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 --local-addr {address}"
    script = f"hostname nowhere.invalid; {doctor}; echo code $?; {torchrun} {PROGRAM} ranks_sum"
    command = ["unshare", "--uts", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "code 1" in done.stdout, done.stderr
    for text in (
        "nowhere.invalid, does not resolve",
        f"give torchrun --local-addr {address}",
        f"Port {taken} cannot be listened at",
    ):
        assert text in done.stdout
    assert done.stdout.count("✗") == 2, "all else is well"
    assert done.returncode == 0, done.stderr


# Where gloo listens under torchrun


@linux
@unit
def test_the_interface_towards_this_machine_is_its_own() -> None:
    assert interfaces()["lo"] == "127.0.0.1"
    assert interface_towards("localhost") == "lo"
    assert interface_towards("nowhere.invalid") is None


@linux
@unit
@pytest.mark.parametrize(
    ("alone", "named", "towards", "chosen"),
    [
        (True, None, "lo", "lo"),
        (False, None, "lo", None),  # `localhost` on the first node says nothing of where the others come from
        (False, None, "eth0", "eth0"),
        (True, None, None, None),
        (False, "eth7", "eth0", "eth7"),
    ],
)
def test_gloo_listens_towards_the_first_rank(
    monkeypatch: pytest.MonkeyPatch, alone: bool, named: str | None, towards: str | None, chosen: str | None
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if named:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
    monkeypatch.setattr(elastic, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": OUTSIDE})
    monkeypatch.setattr(elastic, "interface_towards", lambda host: towards)
    elastic._listen_towards("first", alone=alone)
    assert os.environ.pop("GLOO_SOCKET_IFNAME", None) == chosen
