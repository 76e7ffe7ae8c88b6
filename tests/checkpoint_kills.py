"""Processes killed in a save, at every operation on the file system and at many sizes of files."""

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
import world

from sandbox import checkpoint
from sandbox.checkpoint import folder as folders
from sandbox.checkpoint import whole
from sandbox.config import Config
from sandbox.runtime import Member

WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def die_at(moment: int, folder: Path) -> None:
    """Kill this process when it is about to do something to the file system for the `moment`-th time from now on."""
    seen = count()

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in WRITES and str(folder) in str(args[0]) and next(seen) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def die_at_byte(size: int) -> None:
    """Have the kernel kill this process when a file is about to grow beyond `size` bytes."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def die_in(name: str, size: int) -> None:
    """Kill this process when `size` bytes of the small file `name` are written."""
    write = folders._write

    def part(file: Path, text: str) -> None:
        if file.name == name:
            file.write_text(text[:size])
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, text)

    folders._write = part


def die(kind: str, moment: int, place: Path) -> None:
    """Die at one of the moments of `killed_saves`."""
    if kind == "operation":
        die_at(moment, place)
    elif kind == "byte":
        die_at_byte(moment)
    else:
        die_in(kind, moment)


def killed_saves(
    member: Member, config: Config, folder: Path, bytes_: list[int], tamper: Callable[[], Any] | None = None
) -> tuple[int, list[str]]:
    """Save step 2 after step 1 again and again, killed at every operation and at sizes of files.

    `bytes_`: sizes of the largest file. Step 1 is to be removed in the end.

    -> how often it was killed, and what was wrong with what it left.
    """
    if tamper:
        tamper()
    trainer, pristine = world.trainer_of(member, config), folder / "pristine"
    trainer.train_step()
    checkpoint.save(trainer, pristine)
    good = {1: whole.load(checkpoint.latest(pristine))}
    trainer.train_step()
    good[2] = whole.load(checkpoint.save(trainer, folder / "second"))
    kills, wrong = 0, []
    moments = [*(("operation", moment) for moment in range(200)), *(("byte", size) for size in bytes_)]
    moments += [(name, size) for name in (folders.FACTS, folders.SUMS) for size in (0, 1, 70, 100)]
    over = False
    for kind, moment in moments:
        if kind == "operation" and over:
            continue
        place = folder / f"{kind}{moment}"
        shutil.copytree(pristine, place)
        child = os.fork()
        if child == 0:
            die(kind, moment, place)
            checkpoint.save(trainer, place, keep=1)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += killed
        over |= kind == "operation" and not killed
        try:
            left = checkpoint.latest(place)
            step = folders.facts(left)["step"]
            tensors = whole.load(left)
            if tensors.keys() != good[step].keys() or any(
                not torch.equal(t, good[step][n]) for n, t in tensors.items()
            ):
                wrong.append(f"{kind} {moment}: a mixture")
            if not killed and (step != 2 or [path.name for path in place.iterdir()] != [left.name]):
                wrong.append(f"{kind} {moment}: not killed, and yet unfinished")
        except Exception as error:
            wrong.append(f"{kind} {moment}: {error}")
        if not wrong and killed and moment % 7 == 0:  # and the next save clears away what was left
            if step == 1:
                checkpoint.save(trainer, place, keep=1)
            else:
                shutil.rmtree(folders.begin(place, 3))
            wrong += [f"{kind} {moment}: left {path.name}" for path in place.iterdir() if path.name != "step-000002"]
        shutil.rmtree(place)
    return kills, wrong


def dcp_killed_in_an_overwrite(member: Member, folder: Path) -> list[set[float]]:
    """Torch's DCP by itself: ones over zeros in one folder, killed at each file -> what each of the loads has found.

    A load that fails has found nothing.
    """
    from torch.distributed import checkpoint as dcp

    def save(value: float) -> None:
        tensors = {f"w{number}": torch.full((3,), value) for number in range(4)}
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, thread_count=1)
        dcp.save(tensors, storage_writer=writer, no_dist=True)

    warnings.simplefilter("ignore")
    found, killed, moment = [], True, 0
    while killed:
        shutil.rmtree(folder, ignore_errors=True)
        save(0.0)
        child = os.fork()
        if child == 0:
            die_at(moment, folder)
            save(1.0)
            os._exit(0)
        killed, moment = os.WIFSIGNALED(os.waitpid(child, 0)[1]), moment + 1
        loaded = {f"w{number}": torch.full((3,), -1.0) for number in range(4)}
        try:
            dcp.load(loaded, checkpoint_id=folder, no_dist=True)
            found.append({value for tensor in loaded.values() for value in tensor.tolist()})
        except dcp.api.CheckpointException:  # no Exception
            found.append(set())
    return found


def prune_first() -> None:
    """A saver that makes room before it has anything to put there."""
    begin = folders.begin

    def hasty(folder: Path, step: int) -> Path:
        for old in folder.glob("step-*"):
            shutil.rmtree(old)
        return begin(folder, step)

    folders.begin = hasty
