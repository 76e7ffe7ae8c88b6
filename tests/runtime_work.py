"""What the ranks of test_runtime.py do. As a program: a launcher to interrupt and kill, or a rank under torchrun."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sandbox.errors import ConfigError, SandboxError
from sandbox.runtime import Member, attach, attached, launch, leave

seen: list[int] = []


def ranks_sum(member: Member) -> tuple[int, float]:
    import torch
    import torch.distributed as dist

    total = torch.tensor(float(member.rank))
    member.board.enter(1, "all_reduce", "world", "float32[]")
    dist.all_reduce(total)
    member.board.leave()
    return member.rank, total.item()


def meeting_place(member: Member) -> str:
    """The kind of store that new groups are made by, as far as Python's half of it lives."""
    import gc

    from torch.distributed.distributed_c10d import _get_default_store

    gc.collect()
    return type(_get_default_store().underlying_store.underlying_store).__name__


def imported_by_a_step(member: Member) -> list[str]:
    from world import config, trainer_of

    before = {*sys.modules}
    trainer_of(member, config("zero2")).train_step()
    return sorted({*sys.modules} - before)


def surroundings(member: Member) -> tuple[str | None, str, int, bool]:
    import torch
    import torch.distributed as dist

    return os.environ.get("RUNTIME_TEST"), str(Path.cwd()), torch.get_num_threads(), dist.is_initialized()


def spread_of_memory(member: Member | None = None) -> int:
    """Bytes from the first to the last of a thousand small things."""
    places = [id(thing) for thing in [bytes(200) for _ in range(1000)]]
    return max(places) - min(places)


def is_mapped(member: Member | None = None) -> bool:
    """Whether 16 MiB come from the kernel and go back to it, instead of being kept for who asks next."""
    import torch

    sbrk = ctypes.CDLL(None).sbrk
    sbrk.restype = ctypes.c_void_p
    return bool(torch.empty(2**24, dtype=torch.uint8).data_ptr() > sbrk(0))


def scheduling(member: Member) -> tuple[int, str]:
    return os.sched_getscheduler(0), Path("/proc/self/sched").read_text()


def calls_in_this_process(member: Member) -> int:
    seen.append(member.rank)
    return len(seen)


def send_three(member: Member) -> None:
    for number in range(3):
        member.send((number, member.rank))


def big(member: Member, size: int) -> bytes:
    return bytes(size)


def fail_after_the_others(member: Member) -> None:
    """Rank 2 breaks its connections first, so that its peers fail before its own error is raised."""
    import torch.distributed as dist

    if member.rank == 2:
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(0.1)
        raise ValueError("the cause")
    dist.barrier()
    ranks_sum(member)


def fail_alike(member: Member) -> None:
    raise ValueError("the same")


def misconfigured(member: Member) -> None:
    raise ConfigError("mesh.dp.degree: no")


def die(member: Member, how: Callable[[], None]) -> None:
    if member.rank == 1:
        how()
    ranks_sum(member)


def raise_alone() -> None:
    raise ValueError("alone")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_keeper() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(100)


def keeper_dies(member: Member) -> None:
    die(member, kill_keeper)


def keeper_dies_while_written(member: Member) -> None:
    """The keeper is killed while rank 0 writes where the ranks meet, as it does for as long as it lives."""
    if member.rank == 0:
        while True:
            for folder in Path(os.environ["TMPDIR"]).glob("sandbox-*"):
                (folder / str(time.monotonic_ns())).touch()
    time.sleep(0.1)
    kill_keeper()


class Deadly:
    """Who unpickles it kills itself: the keeper, before it has said anything."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return kill_self, ()


def exit_zero() -> None:
    os._exit(0)


def unpicklable(member: Member) -> Callable[[], None]:
    return lambda: None


def one_stays_away(member: Member) -> None:
    if member.rank == 1:
        time.sleep(100)
    ranks_sum(member)


def one_returns_early(member: Member) -> None:
    if member.rank != 1:
        ranks_sum(member)


def slow_but_talking(member: Member) -> str:
    for _ in range(6):
        time.sleep(0.25)
        member.send("still here")
    return "done"


def stuck(member: Member) -> None:
    member.send("ready")
    time.sleep(100)


def _announce(rank: int, message: Any) -> None:
    print(rank, message, flush=True)


def _main(name: str) -> int:
    work = globals()[name]
    if attached():
        # in one piece, for the ranks share a pipe
        sys.stdout.write(f"{attach(int(os.environ['WORLD_SIZE']), work, timeout=5)}\n")
    else:
        launch(2, work, timeout=60, on_message=_announce)
    return 0


if __name__ == "__main__":
    import runtime_work  # the ranks cannot import what is defined in __main__

    try:
        code = runtime_work._main(sys.argv[1])
    except SandboxError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    leave(code) if attached() else sys.exit(code)
