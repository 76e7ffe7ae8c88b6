"""The process that imports torch once, and forks every world from there.

    launcher --- server          imports torch, then waits for requests
                   └ keeper      one for each world: starts its ranks, reports their deaths, cleans up
                       ├ rank 0
                       └ rank 1 ...

A rank costs a fork instead of seconds of imports, and still is fresh: no rank ever serves two worlds.

A world has one end. Whether its work is over, has failed, or the launcher was interrupted or killed: the keeper sees
its connection to the launcher close or speak, kills the ranks, reaps them and removes their folder. Ranks end at no
other time, for one that left early would break the connections of its peers and hide the real cause under theirs.

Why not multiprocessing's own forkserver: its workers re-import `__main__`, keep the environment, folder and output of
the first call, and outlive a launcher that is killed.
"""

import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import pkgutil
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import sandbox
from sandbox.runtime.board import Board
from sandbox.runtime.failure import Failure
from sandbox.runtime.member import Member, end_with, join, leave
from sandbox.runtime.parcel import pack

__all__ = ["MOST_RANKS", "Request", "serve", "stack_file"]

MOST_RANKS = 240
"""The kernel passes up to 253 files at once, and each rank has one."""

# What DDP, FSDP, DTensor, pipelines and checkpoints import when they are first used: 2 s after torch's own 2.5 s.
_PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.profiler._cupti_monitor",  # by the first step of any optimizer
)
_NOT_OURS = (  # not for ranks, or on demand
    "sandbox.__main__",
    "sandbox.cli",
    "sandbox.doctor",
    "sandbox.engines",
    "sandbox.launchers",
    "sandbox.pytest_plugin",
    "sandbox.report",
)


@dataclass(frozen=True)
class Request:
    """A world to start, as if forked by the launcher. `job` is the pickled work and its arguments; `timeout` in s.

    The keeper creates and removes `folder`, in which the ranks meet. The launcher names it, so that it can remove it
    should the keeper be killed.
    """

    world: int
    job: bytes
    device: str
    timeout: float
    threads: int
    environment: dict[str, str]
    path: list[str]
    cwd: Path
    folder: Path


def stack_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its Python stack on SIGUSR1, innermost frame first."""
    return folder / f"stack.{rank}"


def serve(control: int, modules: Iterable[str]) -> NoReturn:
    """Import, then fork a keeper for each byte that comes in on the socket `control`; end when it closes.

    The byte's files are: the keeper's connection, the board, standard output and error, a connection for each rank.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the ranks as well: Ctrl-C is the launcher's to handle
    gc.disable()  # it would look at all that is imported, again and again: an eighth of the time
    for name in (*_PRELOAD, *modules, *_own_modules()):
        with suppress(Exception):  # the work that needs it will say so
            importlib.import_module(name)
    with suppress(Exception):  # init_process_group does it in each rank, where it would copy the pages it frees
        sys.modules["torch._dynamo.trace_rules"].clear_lru_cache()
    gc.collect()
    gc.freeze()  # or the first collection in each rank would touch, and so copy, every page
    gc.enable()
    fill_holes()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps keepers
    with socket.socket(fileno=control) as requests:
        while True:
            byte, files, _, _ = socket.recv_fds(requests, 1, MOST_RANKS + 4)
            if not byte:
                os._exit(0)
            if os.fork() == 0:
                requests.close()
                _keep(files)
            for file in files:
                os.close(file)


def _own_modules() -> list[str]:
    found = pkgutil.walk_packages(sandbox.__path__, "sandbox.", onerror=lambda name: None)
    return [module.name for module in found if not module.name.startswith(_NOT_OURS)]


def fill_holes() -> None:
    """Take, for good, the memory that lies free between other memory, where the allocator is glibc's.

    What ranks allocate then lies in one piece behind all that the imports left. In the holes, which lie all over it,
    each rank would have the kernel copy thousands of pages: a fifth of the time of a small world.
    """
    if "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return
    libc = ctypes.CDLL(None)
    malloc, sbrk = libc.malloc, libc.sbrk
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    sbrk.argtypes, sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    end, behind = sbrk(0), 0
    left = 2**27  # bytes, should another allocator stand in for glibc's
    while left > 0 and sbrk(0) == end:  # larger holes, then what is left behind them all
        behind, left = malloc(100_000), left - 100_000
    for size in (*(2**exponent for exponent in range(16, 7, -1)), *range(128, 0, -16)):
        while left > 0 and malloc(size) < behind:
            left -= size


def _keep(files: Sequence[int]) -> NoReturn:
    """Be the keeper of one world, from its request to its end."""
    launcher: Connection[Any, Any] = Connection(files[0])
    try:
        request = launcher.recv()
        request.folder.mkdir(mode=0o700)
        alive: dict[int, int] = {}
        try:
            _fork_ranks(request, files, alive)
            launcher.send(list(alive))
            _watch(alive, launcher)
        finally:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            for pid in alive:
                os.waitpid(pid, 0)
            shutil.rmtree(request.folder)
    except (EOFError, ConnectionError):
        pass  # the launcher is gone
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _fork_ranks(request: Request, files: Sequence[int], alive: dict[int, int]) -> None:
    """Start the ranks; note each in `alive`, process id -> rank."""
    board, out, err, *lines = files[1:]
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.cwd)
    sys.path[:] = request.path
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with suppress(Exception):  # import once what all ranks need; they will say what is wrong with it
        pickle.loads(request.job)
    memory = mmap(board, 0)
    keeper = os.getpid()
    for rank, line in enumerate(lines):
        if (pid := os.fork()) == 0:
            try:
                for file in {*files} - {line}:
                    os.close(file)
                end_with(keeper)
                _run(request, rank, Connection(line), Board(memory, rank))
            finally:  # only if the launcher is gone, so that there is nobody to tell
                os._exit(1)
        alive[pid] = rank
    for file in files[1:]:
        os.close(file)


def _watch(alive: dict[int, int], launcher: "Connection[Any, Any]") -> None:
    """Report each death as (rank, exit code), and drop it from `alive`, until the launcher speaks or is gone."""
    bell, ring = os.pipe()
    os.set_blocking(ring, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, or the bell would not ring
    signal.set_wakeup_fd(ring)
    while True:
        for pid, rank in list(alive.items()):
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                del alive[pid]
                launcher.send((rank, os.waitstatus_to_exitcode(status)))
        if launcher in wait([launcher, bell]):
            return
        os.read(bell, 4096)


def _run(request: Request, rank: int, launcher: "Connection[Any, Any]", board: Board) -> NoReturn:
    """Be one rank: do the work, hand over its result or failure, and wait for the end."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    with stack_file(request.folder, rank).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
        device = f"cuda:{rank}" if request.device == "cuda" else request.device
        member = Member(rank, request.world, device, board, lambda message: _post(launcher, "message", message))
        try:
            work, args = pickle.loads(request.job)
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
            store = f"file://{request.folder}/store"
            _kept = join(member, timeout=request.timeout, threads=request.threads, place=store)  # torch asks it later
            _post(launcher, "result", work(member, *args))
        except BaseException as error:
            _post(launcher, "failure", Failure.of(rank, error, board.read()))
        sys.stdout.flush()
        sys.stderr.flush()
        wait([launcher])  # nothing comes: the keeper will kill us
    leave(0)


def _post(launcher: "Connection[Any, Any]", kind: str, value: object) -> None:
    # not Connection.send: its pickler passes tensors by shared memory, which would have to outlive this process
    launcher.send_bytes(pack((kind, value)))
