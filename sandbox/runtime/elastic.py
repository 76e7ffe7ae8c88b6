"""The same work in processes that torchrun started. The only place that reads its environment."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from sandbox.errors import MeshError, SandboxError, WorkerError
from sandbox.runtime.failure import Failure
from sandbox.runtime.member import Member, end_with, join
from sandbox.runtime.network import interface_towards, interfaces, loopback

__all__ = ["attach", "attached", "started"]

T = TypeVar("T")


def attached() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process as one of its ranks."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def started() -> int:
    """The number of ranks that torchrun started."""
    return int(os.environ["WORLD_SIZE"])


def attach(
    world: int,
    work: Callable[..., T],
    *args: Any,
    timeout: float,
    on_message: Callable[[int, Any], None] | None = None,
    device: str = "cpu",
    threads: int = 1,
) -> T:
    """Run `work(member, *args)` as the rank that this process is, of `world`; return its result.

    As `launch`, but for this rank only: `on_message` is called here, and `timeout` s is the longest a collective may
    take. An error is noted for torchrun, whose summary then shows the first.

    End the process by `leave` afterwards.

    Raises MeshError: torchrun started another number of ranks.
    Raises WorkerError: the work failed, or a collective did. SandboxErrors are raised as they are.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())  # or a killed agent leaves us behind, and other nodes waiting for minutes
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if started() != world:
        raise MeshError(
            f"the mesh has {world} ranks, but torchrun started {started()}. Start {world}, or change a degree."
        )
    listener = on_message or (lambda rank, message: None)
    member = Member(
        rank, world, f"cuda:{local}" if device == "cuda" else device, send=lambda message: listener(rank, message)
    )

    _listen_towards(os.environ["MASTER_ADDR"], alone=os.environ.get("LOCAL_WORLD_SIZE") == str(world))
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        join(member, timeout=timeout, threads=threads)
        result = work(member, *args)
        if dist.is_initialized():
            dist.barrier()  # one that left early would break the connections of the others
            dist.destroy_process_group()
        return result
    except Exception as error:
        get_error_handler().record_exception(error)
        if isinstance(error, SandboxError):
            raise
        raise WorkerError(str(Failure.of(rank, error, member.board.read()))) from None


def _listen_towards(first: str, *, alone: bool) -> None:
    """Have gloo listen on the interface that leads to the rank that was `first`, unless the user has named one.

    By itself gloo listens where this machine's own name resolves to: often nowhere, or where no other machine comes.
    """
    name = interface_towards(first)
    if name and (alone or not loopback(interfaces()[name])):  # "localhost" says nothing of the way to other machines
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
