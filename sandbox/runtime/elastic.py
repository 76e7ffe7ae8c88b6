"""The same work in processes that torchrun started. The only place that reads its environment."""

import os
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import uuid4

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

    As `launch`, but for this rank only, and `on_message` is called here. An error is noted for torchrun, whose summary
    then shows the first. Where the ranks hang, or do not start the same collectives, one of them tells, and the
    processes end from here with code 1: what waits in a collective can be reached in no other way.

    End the process by `leave` afterwards.

    Raises MeshError: torchrun started another number of ranks.
    Raises WorkerError: the work failed, or a collective did. SandboxErrors are raised as they are.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())  # or a killed agent leaves us behind, and other nodes waiting for minutes
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if started() != world:
        raise MeshError(
            f"the mesh has {world} ranks, but torchrun started {started()}. Start {world} (--nproc-per-node times "
            "--nnodes), or change a degree, such as mesh.dp.degree."
        )
    listener = on_message or (lambda rank, message: None)
    member = Member(
        rank, world, f"cuda:{local}" if device == "cuda" else device, send=lambda message: listener(rank, message)
    )

    _listen_towards(os.environ["MASTER_ADDR"], alone=os.environ.get("LOCAL_WORLD_SIZE") == str(world))
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from sandbox.runtime.watch import Watch

    watch: Watch | None = None
    try:
        if store := join(member, timeout=timeout, threads=threads):
            watch = Watch(member, store, _agreed(uuid4().hex), timeout)
        result = work(member, *args)
        if watch:
            watch.conclude()  # one that left early would break the connections of the others
            dist.destroy_process_group()
        return result
    except SandboxError as error:
        get_error_handler().record_exception(error)
        raise
    except Exception as error:
        failure = Failure.of(rank, error, member.board.read())
        also = watch.last_word(failure) if watch else ""
        get_error_handler().record_exception(error)
        raise WorkerError(f"{failure}\n{also}" if also else str(failure)) from None


def _agreed(value: str) -> str:
    """The first rank's `value`."""
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _listen_towards(first: str, *, alone: bool) -> None:
    """Have gloo listen on the interface that leads to the rank that was `first`, unless the user has named one.

    By itself gloo listens where this machine's own name resolves to: often nowhere, or where no other machine comes.
    """
    name = interface_towards(first)
    if name and (alone or not loopback(interfaces()[name])):  # "localhost" says nothing of the way to other machines
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
