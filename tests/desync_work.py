"""Ranks that do not call the same collectives. Each does what is said, on one rank only.

As a program, a rank under torchrun: what that rank does, the timeout, and which it is.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import world

from sandbox.checkpoint import Saver
from sandbox.checkpoint.together import Together
from sandbox.comm import Axis, all_gather, all_reduce
from sandbox.config import Config
from sandbox.errors import SandboxError
from sandbox.recorder import Recorder
from sandbox.runtime import Member, attach, leave
from sandbox.trainer import Trainer


def axis_of(member: Member) -> Axis:
    return world.axis_of(member, Recorder(board=member.board))


def in_order(member: Member, sabotage: Callable[[Member, Axis, int], None], rounds: int = 3, struck: int = 1) -> None:
    """Sum two numbers in each round; in the second, the rank `struck` does something else."""
    axis = axis_of(member)
    for number in range(rounds):
        if number == 1 and member.rank == struck:
            sabotage(member, axis, number)
            continue
        for op in ("loss", "norm"):
            all_reduce(torch.ones(2), axis, op).wait()


def nothing(member: Member, axis: Axis, number: int) -> None:
    """What the others do, too."""
    for op in ("loss", "norm"):
        all_reduce(torch.ones(2), axis, op).wait()


def stop(member: Member, axis: Axis, number: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def strike_the_store(member: Member, axis: Axis, number: int) -> None:
    pid, blow = map(int, os.environ["STORE"].split())
    os.kill(pid, blow)
    time.sleep(15)  # longer than the others wait
    os._exit(0)


def slow_store(member: Member, axis: Axis, number: int) -> None:
    """Stop the store for longer than it takes to be missed; then skip, as below."""
    pid, blow = map(int, os.environ["STORE"].split())
    os.kill(pid, blow)
    time.sleep(5)
    os.kill(pid, signal.SIGCONT)
    skip(member, axis, number)


def swap(member: Member, axis: Axis, number: int) -> None:
    """The same sizes, so that nothing hangs: one sum becomes the other."""
    for op in ("norm", "loss"):
        all_reduce(torch.ones(2), axis, op).wait()


def skip(member: Member, axis: Axis, number: int) -> None:
    all_reduce(torch.ones(2), axis, "loss").wait()


def call_another(member: Member, axis: Axis, number: int) -> None:
    all_reduce(torch.ones(2), axis, "loss").wait()
    all_gather(torch.ones(axis.size), [1] * axis.size, axis).wait()


def resize(member: Member, axis: Axis, number: int) -> None:
    all_reduce(torch.ones(2), axis, "loss").wait()
    all_reduce(torch.ones(1), axis, "norm").wait()


def unmatched(member: Member) -> None:
    """Rank 0 starts a collective that it does not wait for, and nobody else does."""
    axis = axis_of(member)
    all_reduce(torch.ones(2), axis).wait()
    if member.rank == 0:
        all_reduce(torch.ones(2), axis)


def saved_by(member: Member, config: Config, folder: Path, savers: Collection[int]) -> None:
    """Save as the training goes on; a rank that is not one of `savers` does not."""
    trainer = world.trainer_of(member, config, Recorder(board=member.board))
    with Saver(folder, asynchronous=True) as saver:
        if member.rank in savers:
            saver.save(trainer)
        else:
            Together.of(trainer, own=True)  # it joins the group of the save, and no more


def read_by(member: Member, readers: Collection[int]) -> None:
    """Do one thing of a checkpoint together; a rank that is not one of `readers` does not."""
    together = Together(recorder=Recorder(board=member.board))
    if member.rank in readers:
        together(lambda: None)


# Under torchrun


def as_torchrun_starts(
    member: Member, rank: int, size: int, port: int, sabotage: Callable[..., None], timeout: float
) -> None:
    """Be rank `rank` of `size`, as under a torchrun whose store has that port."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()}, TORCHELASTIC_USE_AGENT_STORE="True")
    attach(size, in_order, sabotage, timeout=timeout)


# In a training that is verified


def other_first(trainer: Trainer) -> None:
    """Rank 1 sums the norm of its gradient once more than the others do."""
    if trainer.mesh.rank != 1:
        return
    update = trainer.update

    def twice(*args: Any) -> torch.Tensor:
        all_reduce(torch.zeros((), dtype=torch.float64), trainer.mesh.everyone, "norm")
        return update(*args)

    trainer.update = twice  # type: ignore[method-assign]


if __name__ == "__main__":
    code = 0
    try:
        sabotage, timeout, struck = sys.argv[1:]
        attach(int(os.environ["WORLD_SIZE"]), in_order, globals()[sabotage], 3, int(struck), timeout=float(timeout))
    except SandboxError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    leave(code)
