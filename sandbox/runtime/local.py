"""Worlds of fresh processes on this machine."""

import atexit
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from mmap import mmap
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from sandbox.errors import MeshError, WorkerError
from sandbox.runtime.board import Board, outside_torch, size_of
from sandbox.runtime.desync import desync, hang, uneven
from sandbox.runtime.failure import Failure, verdict
from sandbox.runtime.server import MOST_RANKS, Request, stack_file

__all__ = ["launch", "warm"]

T = TypeVar("T")

_LOOK = 1.0  # s between looks at whether the ranks start the same collectives: each costs about 1 ms a rank
_GRACE = 0.3  # s after the first failure in which others are heard: the cause may be the second
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')  # as faulthandler writes it
_FORKABLE = {
    # Neither a pool of threads nor CUDA's driver, which torch else wakes to look for GPUs, survives a fork.
    "OMP_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # Memory in huge pages, where the kernel and glibc can: a fork takes 1 ms instead of 7, and the rank's end 2 for 10.
    "PYTHONMALLOC": "malloc",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Environment of the process that forks ranks; they have their launcher's."""
_lock = threading.Lock()
_server: "_Server | None" = None


def launch(
    world: int,
    work: Callable[..., T],
    *args: Any,
    timeout: float,
    on_message: Callable[[int, Any], None] | None = None,
    device: str = "cpu",
    threads: int = 1,
) -> list[T]:
    """Run `work(member, *args)` in `world` fresh processes; return their results by rank.

    In a world of several ranks the process group is ready when `work` starts: gloo, and NCCL too if `device` is
    `cuda`. `work` and `args` are pickled, so `work` is a function of an importable module. `on_message(rank, message)`
    gets what ranks `member.send`. `threads` are those of torch in each rank: more than one may change sums.

    When this returns or raises, no process and no file is left.

    Raises WorkerError: a rank failed or died, or none noted a collective, sent or returned anything for `timeout` s.
    Raises MeshError: there are too many ranks, or too few GPUs. Other SandboxErrors of a rank are raised as they are.
    """
    if not 1 <= world <= MOST_RANKS:
        raise MeshError(
            f"mesh: {world} ranks, and one machine takes 1 to {MOST_RANKS}. Lower a degree, such as mesh.dp.degree."
        )
    job, folder = pickle.dumps((work, args)), Path(tempfile.gettempdir(), f"sandbox-{uuid4().hex}")
    request = Request(world, job, device, timeout, threads, dict(os.environ), sys.path, Path.cwd(), folder)
    with _world(request) as ranks:
        return _collect(ranks, timeout, on_message or (lambda rank, message: None))


def warm(*modules: str) -> None:
    """Have torch, and `modules` as well, imported in the background, so that the first world need not wait for it."""
    global _server
    with _lock:
        there = _server.modules if _server else ()
        if _server and _server.process.poll() is None and not {*modules} - {*there}:
            return
        wanted = tuple(dict.fromkeys((*there, *modules)))  # in their order: the first may change how the next load
        _stop()
        _server = _Server(wanted)


class _Server:
    """The launcher's end of the server."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self.modules = modules
        self.control, theirs = socket.socketpair()
        code = "import sys; sys.path[:] = {!r}; from sandbox.runtime.server import serve; serve({}, {!r})"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code.format(sys.path, theirs.fileno(), modules)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # out of reach of the terminal's Ctrl-C
                env={**os.environ, **_FORKABLE},
            )


@atexit.register
def _stop() -> None:
    global _server
    if _server:
        _server.control.close()
        _server.process.kill()  # it holds nothing: each world has its keeper
        _server.process.wait()
        _server = None


@dataclass(frozen=True)
class _Ranks:
    """A running world, seen from its launcher."""

    keeper: "Connection[Any, Any]"
    lines: "dict[Connection[Any, Any], int]"
    """Connections of the ranks that have not died."""
    boards: list[Board]
    pids: list[int]
    folder: Path

    def hear(self, patience: float) -> Iterator[tuple[str, int, Any]]:
        """What is said within `patience` s: (`message`, `result` or `failure`; rank; value)."""
        ready = wait([*self.lines, self.keeper], patience)
        for line, rank in list(self.lines.items()):
            if line in ready:
                try:
                    kind, value = pickle.loads(line.recv_bytes())
                except (EOFError, ConnectionError):
                    del self.lines[line]  # the keeper will say how it died
                else:
                    yield kind, rank, value
        if self.keeper in ready:
            try:
                rank, code = self.keeper.recv()
            except (EOFError, ConnectionError):
                raise WorkerError("the ranks died with their keeper: the process above them was killed.") from None
            yield "failure", rank, Failure.exit(rank, code)

    def places(self) -> dict[int, str]:
        """Ask the ranks where in the work they are: rank -> innermost line that is not torch's."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        places = {}
        for rank in range(len(self.boards)):
            with suppress(FileNotFoundError):  # it did not come so far
                stack = stack_file(self.folder, rank).read_text()
                if own := [frame for frame in _FRAME.findall(stack) if outside_torch(frame[0])]:
                    places[rank] = "{}:{} in {}".format(*own[0])
        return places


@contextmanager
def _world(request: Request) -> Iterator[_Ranks]:
    """Start the ranks; end them, whatever happens."""
    with ExitStack() as ours, ExitStack() as theirs:
        pairs = [Pipe() for _ in range(1 + request.world)]
        for near, far in pairs:
            ours.enter_context(near)
            theirs.enter_context(far)
        file = theirs.enter_context(tempfile.TemporaryFile())
        file.truncate(size_of(request.world))
        memory = mmap(file.fileno(), 0)
        (keeper, _), *rest = pairs
        _fork([pairs[0][1].fileno(), file.fileno(), 1, 2, *(far.fileno() for _, far in rest)])
        theirs.close()
        lines = {near: rank for rank, (near, _) in enumerate(rest)}
        try:
            try:
                keeper.send(request)
                pids = keeper.recv()
            except (EOFError, ConnectionError):
                raise WorkerError("the ranks could not be started: the process that forks them ended.") from None
            yield _Ranks(keeper, dict(lines), [Board(memory, rank) for rank in lines.values()], pids, request.folder)
        finally:
            with suppress(EOFError, ConnectionError):
                keeper.send("end")
                while True:
                    keeper.recv()  # until it has reaped the ranks and removed their folder
            if request.folder.exists():  # it was killed instead
                _outwait(lines)
                shutil.rmtree(request.folder, ignore_errors=True)


def _outwait(lines: "Iterable[Connection[Any, Any]]") -> None:
    """Wait until the ranks, whom the kernel kills after their keeper, are gone: they might still write."""
    for line in lines:
        with suppress(EOFError, ConnectionError):
            while line.poll(5):
                line.recv_bytes()


def _fork(files: Sequence[int]) -> None:
    for attempt in range(2):
        warm()
        with _lock:
            assert _server
            try:
                socket.send_fds(_server.control, [b"w"], files)
                return
            except ConnectionError:  # it died since
                if attempt:
                    raise


def _collect(ranks: _Ranks, timeout: float, on_message: Callable[[int, Any], None]) -> list[Any]:
    """Results by rank, or the error."""
    world = len(ranks.boards)
    results: dict[int, Any] = {}
    failures: dict[int, Failure] = {}
    heard = looked = time.monotonic()
    while len(results) + len(failures) < world:
        if failures:
            end = min(failure.moment for failure in failures.values()) + _GRACE
        else:
            end = max(heard, *(board.read().moved for board in ranks.boards)) + timeout
        if (patience := end - time.monotonic()) <= 0:
            break
        for kind, rank, value in ranks.hear(min(patience, _LOOK)):
            heard = time.monotonic()
            if kind == "message":
                on_message(rank, value)
            elif kind == "result":
                results[rank] = value
            elif rank not in results:
                failures.setdefault(rank, value)
        if not failures:
            looked = _look(ranks, looked)
    if failures:
        raise verdict(failures.values(), desync(ranks.boards))
    if len(results) < world:
        raise WorkerError(_hang(ranks, results.keys(), timeout), end - timeout)
    if found := desync(ranks.boards) or uneven(ranks.boards):
        raise WorkerError(found, heard)
    return [results[rank] for rank in range(world)]


def _look(ranks: _Ranks, last: float) -> float:
    """See that the ranks start the same collectives, if the `last` look is long ago -> when that was done last."""
    now = time.monotonic()
    if now - last < _LOOK:
        return last
    if found := desync(ranks.boards):
        raise WorkerError(found, now)
    return now


def _hang(ranks: _Ranks, returned: Set[int], timeout: float) -> str:
    entries, places = [board.read() for board in ranks.boards], ranks.places()
    return hang(ranks.boards, entries, returned=returned, places=places, timeout=timeout)
