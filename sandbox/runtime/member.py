"""What a rank's work is given: who it is, and how to speak to its launcher."""

import ctypes
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

from sandbox.errors import MeshError
from sandbox.runtime.board import Board

__all__ = ["Member", "end_with", "join", "keep_core", "keep_memory", "leave"]

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The number by which the kernel is asked for what libc has no function for."""


@dataclass(frozen=True)
class Member:
    """One rank of a world. `device` is as torch names it: `cpu`, `cuda:1`. The default is a world of its own."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    board: Board = field(default_factory=Board.private, compare=False, repr=False)
    """Where each collective is noted, so that a hang can be explained."""
    send: Callable[[Any], None] = field(default=lambda message: None, compare=False, repr=False)
    """Hand a message that can be pickled to the launcher's `on_message`, in order, from one thread."""


def join(member: Member, *, timeout: float, threads: int, place: str = "env://") -> Any:
    """Set up torch in this process and, in a world of several ranks, the process group -> the store where they met.

    The ranks have `timeout` s to meet at the URL `place`; the default is where torchrun says. Collectives fail after
    twice that: whoever reads the boards sees a hang first, and explains it better. The store, None in a world of one
    rank, is to be kept as long as the process group.

    Raises MeshError: there is no such GPU.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore, PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from sandbox.runtime.store import EagerStore

    torch.set_num_threads(threads)
    device = torch.device(member.device)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise MeshError(f"rank {member.rank} has no GPU: this machine has {torch.cuda.device_count()}.")
        torch.cuda.set_device(device)
    else:
        keep_core()
        keep_memory()
    if member.world == 1:
        return None
    member.board.enter(0, "init_process_group", "world")
    store, *_ = next(rendezvous(place, member.rank, member.world, timeout=timedelta(seconds=timeout)))
    if isinstance(store, FileStore) and device.type == "cpu":  # NCCL has threads of its own that ask
        store = EagerStore(store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("default_pg", store),
        rank=member.rank,
        world_size=member.world,
        timeout=timedelta(seconds=2 * timeout),
        device_id=device if device.type == "cuda" else None,
    )
    member.board.leave()
    return store


def keep_core(thread: int = 0, turn: float = 0.1) -> None:
    """Have a thread, and those that it starts, keep the core until it waits, or for `turn` s, where the kernel can.

    Where ranks outnumber cores, each message of gloo wakes a thread, which would take the core from the one that is
    about to send the next: among four ranks on two cores a small collective then takes four times as long. And while
    one that holds the lock of a connection is off the core, gloo's own thread asks for that lock without a pause: with
    turns of 0.1 s, the kernel's most, instead of some ms, a step takes 3 to 5 % less.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    with suppress(OSError):  # in a sandbox that forbids it
        os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
    if number := _SCHED_SETATTR.get(platform.machine()):
        nice = os.getpriority(os.PRIO_PROCESS, thread)
        attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_BATCH, 0, nice, 0, round(turn * 1e9), 0, 0)
        ctypes.CDLL(None).syscall(number, thread, attributes, 0)  # before Linux 6.12 the length of turns is ignored


def keep_memory() -> None:
    """Have glibc keep what is freed for who asks next, up to 64 MiB, as it does once 32 MiB at a time were freed.

    Before that it gives all but 256 KiB back to the kernel, which clears the same memory several times in each step:
    a hundredth of a step of ours, and up to a fifteenth of torch's.
    """
    import torch

    torch.empty(2**25 - 2**16, dtype=torch.uint8)  # the most that counts, and its header; nothing touches it


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its `parent` dies, where the kernel can."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died first
        os._exit(1)


def leave(code: int) -> NoReturn:
    """End this process with the exit code, and with no destructor: after DDP those hang at random."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
