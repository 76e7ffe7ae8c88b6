"""A training from a config: the work of each rank, and what its launcher shows and writes down."""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sandbox import checkpoint
from sandbox.config import Config
from sandbox.data import Corpus, bits_per_byte
from sandbox.errors import CheckpointError, ConfigError, SandboxError, TrainingError, WorkerError
from sandbox.measure import measured_run
from sandbox.mesh import Mesh
from sandbox.model import build
from sandbox.plan import get_ready, name_of, plan
from sandbox.recorder import Recorder
from sandbox.runtime import Member, attach, attached, launch, started
from sandbox.supervisor import Supervision, resized, supervise
from sandbox.trainer import Step, Trainer

__all__ = ["Log", "Resume", "device_of", "start", "train"]

Resume = Literal["never", "newest", "good"]
"""Where a training begins: at its first step, or if there is one at the newest checkpoint, or the newest good one."""


def train(member: Member, config: Config, folder: Path, resume: Resume) -> float:
    """Train on this rank; report through `member.send` on rank 0 -> the last validation loss, in nats a token.

    A checkpoint that cannot be written is told, and the training goes on; only of the last one it is an error.

    Raises CheckpointError: the newest is damaged, or if `resume` is "good", all of them.
    Raises TrainingError: a loss or a norm that is no number, or a batch that the model cannot take.
    """
    device = torch.device(member.device)
    mesh = Mesh(config.mesh.degrees, member.rank, device.type, Recorder(board=member.board))
    corpus = Corpus.load(config.data, config.model.vocab)
    trainer = Trainer(config, mesh, device, corpus)
    send: Callable[[dict[str, Any]], None] = member.send if member.rank == 0 else lambda message: None
    kept = folder / "checkpoints"

    def warn(text: str) -> None:
        send({"step": trainer.step, "warning": text})

    if resume != "never":
        checkpoint.restore_newest(trainer, kept, warn if resume == "good" else None)
    send({"run": _facts(trainer)})
    every, settings = config.train.eval_every, config.run
    loss = float("nan")
    beside = settings.checkpoint_async and settings.checkpoint_every > 0

    def unsaved(error: CheckpointError) -> None:
        warn(f"{error}. The training goes on.")

    with checkpoint.Saver(kept, keep=settings.checkpoint_keep, asynchronous=beside, warn=unsaved) as saver:
        for step, measured in measured_run(trainer):
            _see_numbers(step, config)
            send(asdict(step))
            if measured:
                send({"step": step.step, "measured": measured.model_dump(mode="json")})
            done = step.step == config.train.steps
            if done or (every and step.step % every == 0):
                loss = trainer.validate()
                send({"step": step.step, "validation_loss": loss, "bits_per_byte": bits_per_byte(loss)})
            if settings.checkpoint_every and (done or step.step % settings.checkpoint_every == 0):
                saver.save(trainer)
    return loss


def _see_numbers(step: Step, config: Config) -> None:
    for what, value in (("loss", step.loss), ("gradient norm", step.grad_norm)):
        if not math.isfinite(value):
            again = "An earlier checkpoint is in the run's folder. " if config.run.checkpoint_every else ""
            raise TrainingError(
                f"step {step.step}: the {what} is {value}. {again}Lower train.lr, set train.clip, or look at the text: "
                "started again as it is, the run would come to the same."
            )


def start(
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    autoresume: bool = False,
    supervision: Supervision | None = None,
) -> float:
    """Train as one rank of torchrun, or launch the whole world here -> the last validation loss, in nats a token.

    `resume` needs a checkpoint in the folder, and takes the newest or none; `autoresume` goes on from the newest good
    one if there is one, and so does a restart. Under torchrun, of `supervision` only the fewest ranks count: restarts
    are torchrun's.
    """
    how = supervision or Supervision()
    how.check(config)
    if attached():
        if how.max_restarts:
            raise ConfigError("--max-restarts: under torchrun, give that to torchrun, and --autoresume to this.")
        if how.min_ranks is not None and started() >= how.min_ranks:
            config = resized(config, started())
    elif how.min_ranks is not None and not how.max_restarts:
        raise ConfigError("--min-ranks: only a restart goes on with fewer. Say --max-restarts, too, such as 1.")
    plan(config)
    device = device_of(config)
    if not attached():
        Corpus.load(config.data, config.model.vocab)  # a text that no rank could read is told before ranks start
    kept, notes = folder / "checkpoints", list[str]()
    first: Resume = "newest" if resume else "good" if autoresume else "never"
    found = checkpoint.latest(kept) if resume else checkpoint.candidate(kept, config) if autoresume else None
    if found:
        checkpoint.check(found, config)
        notes = checkpoint.changes(found, config)
    elif not autoresume and kept.exists() and any(kept.iterdir()):
        raise CheckpointError(
            f"{kept}: holds checkpoints of an earlier run. Go on from there with --resume, name another --folder, "
            "or remove it."
        )
    silent = _last_written(folder / "metrics.jsonl") if found and attached() else None
    get_ready(config)
    with Log(folder, config.train.steps, append=found is not None, notes=notes, silent_since=silent) as log:
        options: dict[str, Any] = {"timeout": config.run.timeout, "on_message": log.take}
        if attached():
            return attach(config.mesh.world, train, config, folder, first, device=device, **options)

        def attempt(config: Config) -> float:
            where: Resume = "good" if log.faults else first
            return launch(config.mesh.world, train, config, folder, where, device=device_of(config), **options)[0]

        return supervise(attempt, config, how, log.fault)


def _last_written(file: Path) -> float | None:
    return file.stat().st_mtime if file.exists() else None


def device_of(config: Config) -> str:
    """`cuda` where the config asks for it, or leaves the choice and each rank on this machine has a GPU; else `cpu`.

    Raises ConfigError: it asks for GPUs that are not there.
    """
    wanted, there = 1 if attached() else config.mesh.world, torch.cuda.device_count()
    if config.run.device == "cuda" and there < wanted:
        raise ConfigError(
            f"run.device: cuda needs a GPU for each rank, {wanted} here, and this machine has {there}. "
            "Set run.device: auto."
        )
    return "cuda" if config.run.device != "cpu" and there >= wanted else "cpu"


class Log:
    """Shows the messages of rank 0, and writes them to `folder`/metrics.jsonl from the first one on, a line each.

    `silent_since`: the last sign of life of a run that is gone on with, by `time.time()`, if its length is to be told.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        *,
        append: bool = False,
        notes: Sequence[str] = (),
        silent_since: float | None = None,
        console: Console | None = None,
    ) -> None:
        self.folder, self.steps, self.append, self.notes = folder, steps, append, notes
        self.console = console or Console(highlight=False)
        self.faults = 0
        self._silent_since = silent_since  # by the clock, until the next step
        self._fault: WorkerError | None = None  # the last one, until the next step
        self._file: TextIO | None = None
        self._entropy = 0.0
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps, text="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()
        if self._file:
            with suppress(OSError):  # of a full disk: every line was flushed, or its failure told
                self._file.close()

    def fault(self, error: WorkerError, number: int) -> None:
        """The world has ended, and will be started for the `number`-th time again."""
        self.faults, self._fault = number, error
        self._write({"restart": number, "fault": str(error)})
        self.console.print(str(error).partition("\n")[0], style="yellow", markup=False, soft_wrap=True)

    def take(self, rank: int, message: dict[str, Any]) -> None:
        """One message of a rank."""
        self._write(message)
        if "warning" in message:
            self.console.print(f"warning: {message['warning']}", style="yellow", markup=False, soft_wrap=True)
        elif "run" in message:
            self._head(message["run"])
        elif "validation_loss" in message:
            loss, bits = message["validation_loss"], message["bits_per_byte"]
            self.console.print(
                f"step {message['step']}  validation loss {loss:.4f}, {bits:.3f} bits per byte "
                f"(unigram entropy {self._entropy:.4f})",
                soft_wrap=True,
            )
        elif "measured" not in message:
            if self._fault:
                self._recovered(self._fault)
            if self._silent_since is not None:
                self._heard_again(self._silent_since)
            self._show(message)

    def _recovered(self, fault: WorkerError) -> None:
        self._fault = None
        if fault.moment is not None:
            took = time.monotonic() - fault.moment
            self._write({"restart": self.faults, "seconds": took})
            self.console.print(f"restart {self.faults}: next step {took:.2f} s after the fault")

    def _heard_again(self, since: float) -> None:
        self._silent_since = None
        took = time.time() - since
        self._write({"seconds_of_silence": took})
        self.console.print(f"next step {took:.2f} s after the last sign of life", soft_wrap=True)

    def _write(self, message: dict[str, Any]) -> None:
        metrics = self.folder / "metrics.jsonl"
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = metrics.open("a" if self.append else "w", encoding="utf-8")
                if self.console.is_terminal:
                    self._bar.start()
            self._file.write(json.dumps(message) + "\n")
            self._file.flush()
        except OSError as error:
            raise SandboxError(
                f"{metrics}: cannot be written ({error.strerror}). Make room, or name another --folder."
            ) from None

    def _head(self, facts: dict[str, Any]) -> None:
        if self._fault:
            place = f"step {facts['from_step']} on {facts['world']} ranks ({facts['mesh']})"
            self.console.print(f"restart {self.faults}: going on from {place}", soft_wrap=True)
        if self._entropy:
            return
        self._entropy = facts["unigram_entropy"]
        self.console.print(
            f"{facts['name']}: {facts['parameters']:,} parameters, {facts['strategy']} on {facts['world']} ranks "
            f"({facts['mesh']}), {facts['device']}\n{facts['corpus']}",
            soft_wrap=True,
        )
        if self.append:
            newest = self.folder / "checkpoints" / f"step-{facts['from_step']:06d}"
            self.console.print(f"going on from {newest}", soft_wrap=True)
        for note in self.notes:
            self.console.print(note, soft_wrap=True)

    def _show(self, step: dict[str, Any]) -> None:
        text = (
            f"loss {step['loss']:.4f}  gradient norm {step['grad_norm']:.3f}  {step['tokens_per_second']:,.0f} tokens/s"
        )
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step["step"], text=text)
        elif step["step"] % max(1, self.steps // 20) == 0 or step["step"] in (1, self.steps):
            self.console.print(f"step {step['step']}/{self.steps}  {text}", soft_wrap=True)


def _facts(trainer: Trainer) -> dict[str, Any]:
    config = trainer.config
    return {
        "name": config.name,
        "engine": config.engine,
        "strategy": name_of(config),
        "mesh": str(config.mesh),
        "world": config.mesh.world,
        "device": str(trainer.device),
        "parameters": sum(p.numel() for p in build(config.model, config.train.dtype).parameters()),
        "unigram_entropy": trainer.corpus.unigram_entropy,
        "corpus": str(trainer.corpus),
        "from_step": trainer.step,
    }
