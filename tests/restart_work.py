"""What launched ranks do in the tests of restarts: train, until they are struck."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from checkpoint_work import moments_dropped

from sandbox import checkpoint, comm, run
from sandbox.checkpoint import resume, saver, storage
from sandbox.checkpoint.together import Together
from sandbox.checkpoint.watched import Watched
from sandbox.config import Config
from sandbox.config import Run as RunConfig
from sandbox.data import Corpus
from sandbox.model.attention import Attention
from sandbox.runtime import Member, launch
from sandbox.supervisor import Supervision
from sandbox.trainer import Trainer

PHASES: dict[str, tuple[Any, str]] = {
    "forward": (Attention, "forward"),
    "backward": (Trainer, "_accumulated"),
    "collective": (comm.Pending, "wait"),
    "update": (Trainer, "update"),
    "save": (saver, "write"),
}
"""What a rank is struck in the middle of: the first call of this, once it has made so many steps."""

KINDS = ("SIGKILL", "SIGSTOP", "raise")


@dataclass(frozen=True)
class Blow:
    """A fault to come: on `rank` (modulo the world), when it has made `after` steps since it was started."""

    rank: int
    after: int
    phase: str
    kind: str

    def arm(self) -> None:
        """Lie in wait, in this process."""
        owner, name = PHASES[self.phase]
        call, step, done = getattr(owner, name), Trainer.train_step, 0

        def struck(*args: Any) -> Any:
            if done >= self.after:
                self.strike()
            return call(*args)

        def counted(trainer: Trainer) -> Any:
            nonlocal done
            result = step(trainer)
            done += 1
            return result

        setattr(owner, name, struck)
        Trainer.train_step = counted  # type: ignore[method-assign]

    def strike(self) -> None:
        if self.kind == "raise":
            raise RuntimeError(f"planted in {self.phase}")
        os.kill(os.getpid(), getattr(signal, self.kind))


def struck(member: Member, config: Config, folder: Path, resume: run.Resume, blow: Blow | None) -> float:
    """`run.train`, with a blow on one of the ranks."""
    if blow and member.rank == blow.rank % member.world:
        blow.arm()
    return run.train(member, config, folder, resume)


def forgetful(member: Member, config: Config, folder: Path, resume: run.Resume, blow: Blow | None) -> float:
    """A restart with a bug: what the optimizer has gathered is not restored."""
    restore = checkpoint.restore_newest

    def forget(trainer: Trainer, *args: Any) -> None:
        restore(trainer, *args)
        moments_dropped(trainer)

    checkpoint.restore_newest = forget
    return struck(member, config, folder, resume, blow)


def not_a_number(member: Member, config: Config, folder: Path, resume: run.Resume, blow: Blow | None) -> float:
    """In the third step, a parameter is none."""
    update = Trainer.update

    def spoil(trainer: Trainer) -> Any:
        norm = update(trainer)
        if trainer.step == 2:
            with torch.no_grad():
                next(iter(trainer.program.parameters.values())).fill_(torch.nan)
        return norm

    Trainer.update = spoil  # type: ignore[method-assign]
    return run.train(member, config, folder, resume)


def unknown_token(member: Member, config: Config, folder: Path, resume: run.Resume, blow: Blow | None) -> float:
    """In the third step, the text holds what the model has no row for."""
    draw = Corpus.batch

    def spoil(corpus: Corpus, step: int, **how: Any) -> Any:
        batch = draw(corpus, step, **how)
        if step == 2:
            batch.tokens[0, 1] = 257
        return batch

    Corpus.batch = spoil  # type: ignore[method-assign]
    return run.train(member, config, folder, resume)


def in_the_second_save(strike: Callable[[], None]) -> None:
    """Have `strike` called before this rank writes its second checkpoint."""
    write, saves = storage._Writer.write_data, 0

    def counted(*args: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves == 2:
            strike()
        return write(*args)

    storage._Writer.write_data = counted  # type: ignore[method-assign]


def full_disk(member: Member, config: Config, folder: Path, resume: run.Resume, blow: Blow | None) -> float:
    """The last rank has no room for the second checkpoint."""

    def full() -> None:
        raise OSError(28, "No space left on device")

    if member.rank == member.world - 1:
        in_the_second_save(full)
    return run.train(member, config, folder, resume)


def flipped(newest: Path) -> Path:
    """One bit of a parameter: the sign of a number in the middle of the largest box -> the file."""
    boxes = storage._Reader(newest).read_metadata().storage_data.items()
    box = max((info for index, info in boxes if index.fqn.startswith("parameters/")), key=lambda info: info.length)
    file = newest / box.relative_path
    content, place = bytearray(file.read_bytes()), box.offset + (box.length // 2 | 7)
    content[place] ^= 0x80
    file.write_bytes(content)
    return file


def cut_short(newest: Path) -> Path:
    file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    return file


def emptied(newest: Path) -> Path:
    os.truncate(newest / "run.json", 0)
    return newest / "run.json"


def killed_by_what_also_spoils(spoil: Callable[[Path], Path], member: Member, *args: Any) -> float:
    """After the third step, the first rank spoils its checkpoint and dies."""
    (config, folder, where, blow), step = args, Trainer.train_step

    def spoiled(trainer: Trainer) -> Any:
        if trainer.step == 3:
            spoil(checkpoint.latest(folder / "checkpoints"))
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer)

    if blow and member.rank == 0:
        Trainer.train_step = spoiled  # type: ignore[method-assign]
    return run.train(member, config, folder, where)


def blind(spoil: Callable[[Path], Path], member: Member, *args: Any) -> float:
    """The same, but checksums are not looked at."""
    resume.problems = lambda *_: []
    return killed_by_what_also_spoils(spoil, member, *args)


def slow_disk(member: Member, config: Config, folder: Path, resume: run.Resume, blow: Blow | None) -> float:
    """For the last rank's first checkpoint, the disk takes a third of `run.timeout` for some KiB."""
    write, writes = Watched.write, 0

    def slow(file: Watched, data: Any) -> int:
        nonlocal writes
        writes += 1
        if writes <= 6:
            time.sleep(config.run.timeout / 3)
        return write(file, data)

    if member.rank == member.world - 1:
        Watched.write = slow  # type: ignore[method-assign]
    return run.train(member, config, folder, resume)


def slow_disk_that_is_not_heard(member: Member, *args: Any) -> float:
    """The same, but nobody hears of the bytes that it does take."""
    Together.moved = lambda together, count: None  # type: ignore[method-assign]
    return slow_disk(member, *args)


def stuck_disk(member: Member, config: Config, folder: Path, resume: run.Resume, blow: Blow | None) -> float:
    """In its second checkpoint the last rank never comes back from the disk."""

    def stick() -> None:
        Watched.write = lambda file, data: threading.Event().wait()  # type: ignore[method-assign]

    if blow and member.rank == member.world - 1:
        in_the_second_save(stick)
    return run.train(member, config, folder, resume)


def drawn(seed: int, count: int) -> list[Blow]:
    """Random faults, each within the first three steps after the last."""
    draw = random.Random(seed)
    return [
        Blow(draw.randrange(12), draw.randrange(3), draw.choice(list(PHASES)), draw.choice(KINDS)) for _ in range(count)
    ]


def with_run(config: Config, **settings: Any) -> Config:
    run_ = RunConfig.model_validate({"device": "cpu", "checkpoint_every": 1, "timeout": 3, **settings})
    train = config.train.model_copy(update={"eval_batches": 1})
    return config.model_copy(update={"run": run_, "train": train})


def supervised(
    config: Config,
    folder: Path,
    blows: Sequence[Blow] = (),
    min_ranks: int | None = None,
    train: Callable[..., float] = struck,
    restarts: int | None = None,
) -> float:
    """`run.start`, with one of the blows in each attempt while they last."""
    coming: Iterator[Blow] = iter(blows)
    if not blows:  # nothing will hang, but a disk under load may take its time
        config = config.model_copy(update={"run": config.run.model_copy(update={"timeout": world.TIMEOUT})})

    def launch_struck(count: int, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        assert work is run.train
        return launch(count, train, *args, next(coming, None), **options)

    if restarts is None:
        restarts = len(blows) + 20 if blows else 0  # on a machine under load, a slow step may look like a hang
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "launch", launch_struck)
        return run.start(config, folder, supervision=Supervision(restarts, min_ranks))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[tuple[int, tuple[float, float]]]:
    """(step, (loss, gradient norm)), in the order in which they were made: some again after a fault."""
    return [(line["step"], (line["loss"], line["grad_norm"])) for line in metrics(folder) if "loss" in line]
