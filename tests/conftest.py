"""Every test has a tier; and where worlds will be started, torch is imported for them while the tests are collected."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from traced import Traced

from sandbox.runtime import warm

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns, when tests of it are collected, that it is so
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of torch that wait for a core take ten times as long
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script's background jobs have it, and hand on to theirs
    signal.signal(signal.SIGINT, signal.default_int_handler)
TIERS = {"unit", "parity"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--draws", type=int, default=25, help="how many plans thorough/test_any_plan.py draws")
    parser.addoption(
        "--faults",
        type=int,
        default=50,
        help="how many strike a run of thorough/, of one host or two, in twice the steps",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in ("thorough", "cluster"):
            item.add_marker(item.path.parent.name)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(600))
    without = [item.nodeid for item in items if len(TIERS & {mark.name for mark in item.iter_markers()}) != 1]
    if without:
        raise pytest.UsageError("mark these unit or parity, and not both:\n" + "\n".join(without))


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.get_closest_marker("parity") for item in session.items) and not session.config.option.collectonly:
        warm()


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Traced]:
    programs = Traced(tmp_path)
    yield programs
    for pid in programs.processes():
        os.kill(pid, signal.SIGKILL)
