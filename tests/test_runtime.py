import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import runtime_work as work
from traced import Traced

from sandbox.errors import ConfigError, MeshError, WorkerError
from sandbox.runtime import Board, Member, attached, launch
from sandbox.runtime.board import Entry, stalled
from sandbox.runtime.failure import Failure, verdict

parity = pytest.mark.parity
unit = pytest.mark.unit
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
glibc = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="memory is handed out by another libc")
PROGRAM = Path(work.__file__)


@unit
def test_the_runtime_is_imported_without_torch() -> None:
    check = "import sandbox.runtime, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@unit
def test_a_board_tells_where_a_rank_is() -> None:
    board = Board.private()
    assert str(board.read()) == "no collective so far"
    board.enter(7, "all_gather", "dp_shard", "float32[32, 32]")
    assert board.read().waiting
    assert "in #7 all_gather of float32[32, 32] over dp_shard" in str(board.read())
    board.leave()
    assert not board.read().waiting
    assert str(board.read()).startswith("finished #7 all_gather of float32[32, 32] over dp_shard")
    left = board.read().moved
    board.alive()
    assert board.read().moved >= left == board.read().left
    assert str(board.read()).endswith("; moved a checkpoint's bytes 0.0 s ago")


def at(number: int, *, waiting: bool = True) -> Entry:
    return Entry(1.0, 0.0 if waiting else 2.0, number, "all_reduce", "dp", "float64[]")


@unit
@pytest.mark.parametrize(
    ("entries", "returned", "line"),
    [
        ([at(2), at(1, waiting=False), at(2)], set(), "Rank 1 never arrived: the others wait in #2 all_reduce"),
        ([at(2), at(1, waiting=False), at(2)], {1}, "Rank 1 (returned already) never arrived"),
        ([at(2), at(3), at(2)], set(), "Rank 1 waits in another collective than the others, which are in #2"),
        ([at(2), at(3)], set(), "They wait in different collectives."),
        ([at(2), at(2)], set(), "All wait in the same collective"),
        ([at(2, waiting=False)] * 2, set(), "None waits in a collective"),
    ],
)
def test_a_hang_is_blamed_on_the_odd_one_out(entries: list[Entry], returned: set[int], line: str) -> None:
    text = stalled(entries, returned=returned, silent=set(), places={}, timeout=5)
    assert text.startswith(f"no rank made progress for 5 s. {line}")
    assert len(text.splitlines()) == 1 + len(entries)


@unit
def test_an_echo_is_never_the_cause_even_if_it_came_first() -> None:
    echo = Failure(0, "rank 0 failed: connection closed", echo=True, moment=1)
    cause = Failure(1, "rank 1 failed: ValueError", moment=2)
    later = Failure(2, "rank 2 failed: KeyError", moment=3)
    text = str(verdict([echo, later, cause]))
    assert text.splitlines() == [
        "rank 1 failed: ValueError",
        "Also failed on its own: rank 2.",
        "Failed as a consequence: rank 0.",
    ]


@unit
def test_a_process_is_attached_only_if_all_of_torchruns_variables_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert not attached()
    monkeypatch.setenv("MASTER_PORT", "1")
    assert attached()


@unit
def test_a_world_without_ranks_is_refused() -> None:
    with pytest.raises(MeshError, match="0 ranks"):
        launch(0, work.ranks_sum, timeout=1)


@parity
@pytest.mark.parametrize("world", [2, 3, 8])
def test_results_come_back_by_rank(world: int) -> None:
    assert launch(world, work.ranks_sum, timeout=20) == [(r, sum(range(world))) for r in range(world)]


@parity
def test_all_that_a_step_imports_is_imported_before_the_first_fork() -> None:
    assert launch(2, work.imported_by_a_step, timeout=20) == [[], []]


@parity
def test_ranks_meet_in_a_store_that_does_not_nap_and_outlives_its_maker() -> None:
    assert launch(2, work.meeting_place, timeout=20) == ["EagerStore"] * 2


@unit
def test_a_key_that_is_late_is_seen_after_the_shortest_of_naps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.distributed import DistStoreError, FileStore, PrefixStore  # type: ignore[attr-defined]

    from sandbox.runtime.store import EagerStore

    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 7:
            FileStore(str(tmp_path / "store"), 2).set("made/late", "\x00")  # as another rank would

    monkeypatch.setattr("time.sleep", nap)
    ours = EagerStore(FileStore(str(tmp_path / "store"), 2))
    gloos = PrefixStore("made", ours)  # asks by C++, as gloo does
    gloos.set("soon", "here")
    assert (gloos.get("soon"), naps) == (b"here", [])
    assert gloos.get("late") == b"\x00"
    assert naps == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.01, 0.01]
    assert (gloos.add("count", 2), gloos.add("count", 3), gloos.check(["late"]), gloos.check(["never"])) == (
        2, 5, True, False,
    )  # fmt: skip
    monkeypatch.undo()
    gloos.set_timeout(timedelta(milliseconds=20))
    with pytest.raises(DistStoreError, match="waited in vain for another rank to write made/never"):
        gloos.get("never")


@parity
def test_ranks_live_in_the_callers_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_TEST", "here")
    monkeypatch.chdir(tmp_path)
    assert launch(1, work.surroundings, timeout=20) == [("here", str(tmp_path), 1, False)]
    assert launch(1, work.surroundings, timeout=20, threads=2) == [("here", str(tmp_path), 2, False)]
    assert launch(2, work.surroundings, timeout=20)[1] == ("here", str(tmp_path), 1, True)


@linux
@parity
@pytest.mark.skipif(not Path("/proc/self/sched").exists(), reason="this kernel does not tell how it schedules")
def test_ranks_interrupt_nobody_and_take_long_turns() -> None:
    new = [int(number) for number in platform.release().split(".")[:2]] >= [6, 12]
    for policy, about in launch(2, work.scheduling, timeout=20):
        assert policy == os.SCHED_BATCH
        turns = re.search(r"se\.slice +: +(\d+)", about)
        assert not new or (turns and int(turns[1]) == 100_000_000)


def printed(*lines: str) -> str:
    """What these lines print in a fresh process whose memory comes from malloc, as in the one that forks ranks."""
    env = {**os.environ, "PYTHONMALLOC": "malloc", "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.check_output([sys.executable, "-c", "\n".join(lines)], env=env, text=True)


@glibc
@parity
def test_the_memory_of_a_rank_lies_in_one_piece() -> None:
    """Strewn among what the imports left, over 200 MB, it costs a copy of each page."""
    assert max(launch(2, work.spread_of_memory, timeout=20)) < 2**20


@glibc
@unit
@pytest.mark.parametrize("filled", [True, False])
def test_memory_comes_from_holes_unless_they_are_filled(filled: bool) -> None:
    spread = printed(
        "from sandbox.runtime.server import fill_holes; from runtime_work import spread_of_memory",
        "kept = [bytes(200) for _ in range(40_000)]; del kept[::40]",
        f"if {filled}: fill_holes()",
        "print(spread_of_memory())",
    )
    assert (int(spread) < 2**20) is filled


@glibc
@parity
def test_ranks_keep_the_memory_that_is_freed() -> None:
    assert not any(launch(2, work.is_mapped, timeout=20))


@glibc
@unit
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_goes_back_to_the_kernel_unless_it_is_kept(kept: bool) -> None:
    mapped = printed(
        "from sandbox.runtime.member import keep_memory; from runtime_work import is_mapped",
        f"if {kept}: keep_memory()",
        "print(is_mapped())",
    )
    assert mapped == f"{not kept}\n"


@parity
def test_no_process_serves_two_worlds() -> None:
    assert [launch(1, work.calls_in_this_process, timeout=20) for _ in range(2)] == [[1], [1]]


@parity
def test_messages_arrive_in_order_and_before_the_result() -> None:
    heard: list[tuple[int, tuple[int, int]]] = []
    launch(2, work.send_three, timeout=20, on_message=lambda rank, message: heard.append((rank, message)))
    for rank in range(2):
        assert [message for sender, message in heard if sender == rank] == [(0, rank), (1, rank), (2, rank)]


@parity
def test_a_result_may_be_larger_than_a_pipe() -> None:
    assert [len(result) for result in launch(2, work.big, 10_000_000, timeout=20)] == [10_000_000] * 2


@parity
def test_the_cause_stands_on_top_though_the_others_failed_first() -> None:
    with pytest.raises(WorkerError) as caught:
        launch(4, work.fail_after_the_others, timeout=20)
    first, *rest = str(caught.value).splitlines()
    assert first == "rank 2 failed: ValueError: the cause"
    assert rest[-1].startswith("Failed as a consequence: rank")
    assert "runtime_work.py" in rest[1], "the traceback begins in the work"
    assert launch(2, work.ranks_sum, timeout=20) == [(0, 1), (1, 1)], "and the next world is not harmed"


@parity
@pytest.mark.parametrize("how", [work.raise_alone, work.kill_self])
def test_two_seconds_after_a_failure_no_rank_is_left(how: Callable[[], None]) -> None:
    took = []
    for _ in range(3):  # the machine may be busy for a moment; the quickest tells what the launcher needs
        with pytest.raises(WorkerError) as caught:
            launch(4, work.die, how, timeout=60)
        assert caught.value.moment is not None
        took.append(time.monotonic() - caught.value.moment)
    assert min(took) < 2


@parity
def test_ranks_that_fail_alike_are_counted_together() -> None:
    with pytest.raises(WorkerError, match=r"(?s)\Arank \d failed: ValueError: the same\n.*Also failed on their own: "):
        launch(3, work.fail_alike, timeout=20)


@parity
def test_a_users_error_comes_through_as_itself() -> None:
    with pytest.raises(ConfigError) as caught:
        launch(2, work.misconfigured, timeout=20)
    assert type(caught.value) is ConfigError
    assert str(caught.value) == "mesh.dp.degree: no"


@parity
@pytest.mark.parametrize(
    ("how", "line"),
    [
        (work.kill_self, r"rank 1 was killed by signal 9 \(SIGKILL\)\n.*memory ran out"),
        (work.exit_zero, "rank 1 ended with exit code 0 before its work was over"),
    ],
)
def test_a_dead_rank_is_named_and_not_its_peers(how: Callable[[], None], line: str) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match=rf"\A{line}"):
        launch(3, work.die, how, timeout=60)
    assert time.monotonic() - start < 15, "without waiting for the timeout"


@parity
def test_a_result_that_cannot_be_pickled_is_a_failure_of_the_rank() -> None:
    with pytest.raises(WorkerError, match=r"\Arank 0 failed: .*local object"):
        launch(1, work.unpicklable, timeout=20)


@parity
def test_a_hang_names_the_rank_that_never_arrived_and_where_it_is() -> None:
    with pytest.raises(WorkerError) as caught:
        launch(3, work.one_stays_away, timeout=1)
    first, *ranks = str(caught.value).splitlines()
    assert first.endswith("Rank 1 never arrived: the others wait in #1 all_reduce of float32[] over world.")
    assert "finished #0 init_process_group" in ranks[1]
    assert re.search(r"at .*runtime_work\.py:\d+ in one_stays_away$", ranks[1])
    assert "waiting for" in ranks[2]


@parity
def test_a_rank_that_returned_without_its_peers_is_named() -> None:
    with pytest.raises(WorkerError, match=r"Rank 1 \(returned already\) never arrived"):
        launch(3, work.one_returns_early, timeout=1)


@parity
def test_a_rank_that_talks_does_not_hang() -> None:
    assert launch(1, work.slow_but_talking, timeout=1) == ["done"]


@linux
@parity
@pytest.mark.parametrize(
    ("name", "code"), [("ranks_sum", 0), ("fail_alike", 1), ("misconfigured", 2), ("keeper_dies", 1)]
)
def test_nothing_is_left_behind(traced: Traced, name: str, code: int) -> None:
    with traced.start(str(PROGRAM), name) as program:
        program.communicate()
    assert program.returncode == code
    assert traced.gone()


@linux
@parity
@pytest.mark.parametrize(
    ("run", "args", "line"),
    [
        (work.keeper_dies_while_written, (), "the ranks died with their keeper"),
        (work.ranks_sum, (work.Deadly(),), "the ranks could not be started"),
    ],
)
def test_a_killed_keeper_leaves_no_file(
    run: Callable[..., object], args: tuple[object, ...], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for _ in range(5):  # it takes luck to be seen
        with pytest.raises(WorkerError, match=line):
            launch(2, run, *args, timeout=20)
        assert not list(tmp_path.iterdir())


@linux
@parity
@pytest.mark.parametrize(("blow", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, -15)])
def test_no_rank_outlives_its_launcher(traced: Traced, blow: signal.Signals, code: int) -> None:
    with traced.start(str(PROGRAM), "stuck") as program:
        assert program.stdout
        assert {program.stdout.readline(), program.stdout.readline()} == {"0 ready\n", "1 ready\n"}
        assert len(traced.processes()) == 5, "launcher, server, keeper and two ranks"
        assert traced.files()
        for pid in traced.processes():
            if blow == signal.SIGINT and pid != program.pid:  # as a terminal does: to all of them
                os.kill(pid, blow)
        program.send_signal(blow)
        _, errors = program.communicate()
    assert program.returncode == code
    assert errors == ""
    assert traced.gone()


@linux
@parity
def test_torchrun_runs_the_same_work(traced: Traced) -> None:
    with traced.start(*TORCHRUN, str(PROGRAM), "ranks_sum") as program:
        output, errors = program.communicate()
    assert program.returncode == 0, errors
    assert sorted(output.splitlines()) == ["(0, 1.0)", "(1, 1.0)"]
    assert not traced.processes()


@linux
@parity
def test_torchruns_summary_shows_the_cause(traced: Traced) -> None:
    with traced.start(*TORCHRUN, str(PROGRAM), "fail_alike") as program:
        _, errors = program.communicate()
    assert program.returncode == 1
    assert "rank 0 failed: ValueError: the same" in errors or "rank 1 failed: ValueError: the same" in errors
    assert "ValueError: the same" in errors.partition("Root Cause")[2]
    assert not traced.processes()


@linux
@parity
def test_a_hang_under_torchrun_names_the_rank_that_never_arrived_and_where_it_is(traced: Traced) -> None:
    with traced.start(*TORCHRUN, str(PROGRAM), "one_stays_away") as program:
        _, errors = program.communicate()
    assert program.returncode == 1
    report, _, rest = errors.partition("rank 1 ends: rank 0 tells why.")
    first, *ranks = report.splitlines()
    assert first.endswith("Rank 1 never arrived: the others wait in #1 all_reduce of float32[] over world.")
    assert "waiting for" in ranks[0]
    assert re.search(r"finished #0 init_process_group .*; at .*runtime_work\.py:\d+ in one_stays_away$", ranks[1])
    assert "Rank 1 never arrived" in rest.partition("Root Cause")[2]
    assert not traced.processes()


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@unit
def test_a_member_by_default_is_a_world_of_its_own() -> None:
    member = Member()
    member.send("nobody listens")
    assert (member.rank, member.world, member.device) == (0, 1, "cpu")
