"""Ranks that do not start the same collectives are told apart, whether they hang, fail, or compute something else."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from typing import Any

import desync_work as work
import pytest
import torch.distributed as dist
import world
from traced import Traced

from sandbox.checkpoint import latest
from sandbox.config import Run
from sandbox.errors import WorkerError
from sandbox.runtime import launch
from sandbox.runtime.board import KEPT, Board, size_of
from sandbox.runtime.desync import desync, uneven
from sandbox.verify import Case, fixture

unit, parity = pytest.mark.unit, pytest.mark.parity
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def recovery(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.recovery(parity(test))


Call = tuple[int, str, str, str]  # as Board.start
ALL, PAIR = 0b111, 0b101


def boards(*ranks: Sequence[Call]) -> list[Board]:
    memory = mmap(-1, size_of(len(ranks)))
    found = [Board(memory, rank) for rank in range(len(ranks))]
    for board, calls in zip(found, ranks, strict=True):
        for call in calls:
            board.start(*call)
    return found


LOSS, NORM, GATHER = (
    (ALL, "loss", "dp", "float64[]"),
    (ALL, "norm", "dp", "float64[]"),
    (ALL, "all_gather", "dp", "float64[8]"),
)
OTHER = (PAIR, "all_reduce", "tp", "float32[2, 4]")


@unit
@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([[], [], []], ""),
        ([[LOSS, NORM], [LOSS, NORM], [LOSS, NORM]], ""),
        ([[LOSS, NORM], [LOSS], []], ""),  # behind, perhaps on their way
        ([[OTHER, LOSS, OTHER], [LOSS], [LOSS, OTHER, OTHER]], ""),  # groups have each their own order
        (
            [[LOSS, NORM], [NORM, LOSS], [LOSS, NORM]],
            "Ranks disagree on collective 1 over dp: ranks 0 and 2: loss of float64[] over dp, "
            "rank 1: norm of float64[] over dp.",
        ),
        (
            [[LOSS, GATHER], [LOSS, GATHER], [LOSS, (ALL, "all_gather", "dp", "float64[9]")]],
            "Ranks disagree on collective 2 over dp: ranks 0 and 1: all_gather of float64[8] over dp, "
            "rank 2: all_gather of float64[9] over dp.",
        ),
        (
            [[OTHER], [], [(PAIR, "all_reduce", "cp", "float32[2, 4]")]],
            "Ranks disagree on collective 1 over tp: rank 0: all_reduce of float32[2, 4] over tp, "
            "rank 2: all_reduce of float32[2, 4] over cp.",
        ),
        (
            [[LOSS, *[NORM] * KEPT], [NORM] * (1 + KEPT), []],
            "Ranks disagree on the collectives over dp, at number 2 or before: ranks 0 and 1.",
        ),
    ],
)
def test_the_first_collective_that_differs_is_named(ranks: list[list[Call]], text: str) -> None:
    assert desync(boards(*ranks)) == text


@unit
@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([[LOSS], [LOSS], [LOSS]], ""),
        ([[LOSS], [LOSS], []], "Collectives started over dp: ranks 0 and 1: 1, rank 2: 0."),
        ([[LOSS, OTHER], [LOSS], [LOSS]], "Collectives started over tp: rank 0: 1, rank 2: 0."),
    ],
)
def test_those_who_are_behind_are_named(ranks: list[list[Call]], text: str) -> None:
    assert uneven(boards(*ranks)) == text


def fault(world_: int, *args: Any) -> str:
    with pytest.raises(WorkerError) as caught:
        launch(world_, *args, timeout=2)
    return str(caught.value)


LOST, SUMMED = "loss of float32[2] over dp", "norm of float32[2] over dp"
DIFFERENCES = [
    (work.swap, f"collective 3 over dp: ranks 0 and 2: {LOST}, rank 1: {SUMMED}."),
    (work.skip, f"collective 4 over dp: ranks 0 and 2: {SUMMED}, rank 1: {LOST}."),
    (work.call_another, f"collective 4 over dp: ranks 0 and 2: {SUMMED}, rank 1: all_gather of float32[3] over dp."),
    (work.resize, f"collective 4 over dp: ranks 0 and 2: {SUMMED}, rank 1: norm of float32[1] over dp."),
]


@parity
@pytest.mark.parametrize(("sabotage", "text"), DIFFERENCES)
def test_a_rank_that_calls_another_collective_is_named(sabotage: Callable[..., None], text: str) -> None:
    assert f"Ranks disagree on {text}" in fault(3, work.in_order, sabotage)


@parity
def test_a_collective_that_the_others_never_start_is_named() -> None:
    assert fault(2, work.unmatched) == "Collectives started over dp: rank 0: 2, rank 1: 1."


@parity
def test_a_rank_that_takes_no_part_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    absent = "Rank 1 (returned already) never arrived: the others wait in #1 checkpoint over world."
    assert absent in fault(3, work.read_by, [0, 2])
    assert absent in fault(3, work.saved_by, world.config(world=3), tmp_path, [0, 2])


@parity
def test_a_checkpoint_of_all_ranks_is_no_fault(tmp_path: Path) -> None:
    """The twin of the one above."""
    launch(3, work.read_by, range(3), timeout=world.TIMEOUT)
    launch(3, work.saved_by, world.config(world=3), tmp_path, range(3), timeout=world.TIMEOUT)
    assert latest(tmp_path).name == "step-000000"


@parity
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_verifying_names_the_desync(strategy: str) -> None:
    config = fixture(world.config(strategy, 3)).model_copy(update={"run": Run(timeout=3)})
    started = time.monotonic()
    verdict = world.verifier().verify(Case(config, work.other_first))
    assert time.monotonic() - started < world.TIMEOUT / 2, "as soon as they disagree, not when time is up"
    assert verdict.status == "failed"
    assert re.search(r"Ranks disagree on collective \d+ over dp_shard: .*rank 1: norm of float64\[\]", verdict.cause)
    assert world.verifier().verify(Case(config)).held


# Under torchrun


def local_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextmanager
def store_apart() -> Iterator["tuple[subprocess.Popen[str], int]"]:
    """A process that keeps a store, as torchrun's agent does -> its port."""
    code = """if True:
        import time, torch.distributed as dist
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        print(store.port, flush=True)
        time.sleep(1000)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout
        try:
            yield keeper, int(keeper.stdout.readline())
        finally:
            keeper.kill()


def started(port: int, sabotage: Callable[..., None], timeout: float) -> list[str]:
    """What comes of three ranks, each by itself: the error, or nothing."""

    def rank(number: int) -> str:
        try:
            launch(1, work.as_torchrun_starts, number, 3, port, sabotage, timeout, timeout=world.TIMEOUT)
        except WorkerError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(rank, range(3)))


ENDED = "rank 0 ended with exit code 1 before its work was over"


@parity
@pytest.mark.parametrize(("sabotage", "text"), DIFFERENCES)
def test_without_a_launcher_one_rank_tells_of_the_desync_as_soon_as_there_is_one(
    capfd: pytest.CaptureFixture[str], sabotage: Callable[..., None], text: str
) -> None:
    store = local_store()
    errors = started(store.port, sabotage, timeout=1000)
    report = f"Ranks disagree on {text}"
    if sabotage is work.swap:  # nothing hangs: at the end
        assert errors == [report, "", ""]
        return
    told = capfd.readouterr().err.splitlines()
    assert report in told[0] + errors[0]
    assert {"rank 1 ends: rank 0 tells why.", "rank 2 ends: rank 0 tells why."} <= {*told}
    assert errors[1:] == [ENDED, ENDED]


@parity
def test_without_a_launcher_ranks_that_agree_are_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """The twin of those above and below."""
    store = local_store()
    assert started(store.port, work.nothing, timeout=4) == ["", "", ""]
    assert capfd.readouterr().err == ""


@linux
@recovery
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_store_that_is_gone_or_does_not_answer_holds_up_no_report(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, blow: signal.Signals
) -> None:
    with store_apart() as (keeper, port):
        monkeypatch.setenv("STORE", f"{keeper.pid} {blow.value}")
        begun = time.monotonic()
        assert started(port, work.strike_the_store, timeout=4)[::2] == [ENDED, ENDED]
    assert time.monotonic() - begun < world.TIMEOUT / 2
    told = capfd.readouterr().err
    for rank in (0, 2):
        assert re.search(
            f"rank {rank} makes no progress: waiting for .* in #3 {re.escape(LOST)}. The store .* does not", told
        )


@linux
@recovery
def test_a_store_that_was_slow_is_asked_again(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_apart() as (keeper, port):
        monkeypatch.setenv("STORE", f"{keeper.pid} {signal.SIGSTOP.value}")
        errors = started(port, work.slow_store, timeout=1000)
    told = capfd.readouterr().err
    assert f"Ranks disagree on {dict(DIFFERENCES)[work.skip]}" in told + errors[0]
    assert "The store" not in told


@linux
@recovery
@pytest.mark.parametrize("stopped", [0, 1])
def test_under_torchrun_a_rank_that_is_stopped_is_named_by_the_first_of_the_others(
    traced: Traced, stopped: int
) -> None:
    """Of several others, if the first rank is lost, by any."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3")
    with traced.start(*torchrun, work.__file__, "stop", "6", str(stopped)) as program:
        assert program.stderr
        lines: list[str] = []
        for line in program.stderr:
            lines.append(line)
            if re.match("rank . ends", line):  # torchrun would ask the stopped one for 30 s
                time.sleep(1.1)  # it tells deaths apart by the second
                for pid in traced.processes(f"\0RANK={stopped}\0"):
                    os.kill(pid, signal.SIGKILL)
    assert program.returncode == 1
    report = [line for line in lines if re.match("no rank|  rank|rank", line)]
    assert report[0].endswith(f" Rank {stopped} (silent) never arrived: the others wait in #3 {LOST}.\n")
    for rank, line in enumerate(report[1:4]):
        state = "does not answer: stopped, dead or cut off. It was last seen " if rank == stopped else "waiting for "
        assert line.startswith(f"  rank {rank}: {state}")
    ends = ["rank 2 ends: rank 0 tells why.\n"]
    assert report[4] in (ends if stopped else ["rank 2 ends: rank 1 tells why.\n", "rank 1 ends: rank 2 tells why.\n"])
    cause = "".join(lines).partition("Root Cause")[2]
    assert f"Rank {stopped} (silent) never arrived: the others wait in #3 {LOST}" in cause
    assert not traced.processes()
