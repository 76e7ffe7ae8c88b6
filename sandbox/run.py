"""A training from a config: the work of each rank, and what its launcher shows and writes down."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sandbox import checkpoint
from sandbox.comm import Recorder
from sandbox.config import Config
from sandbox.data import Corpus, bits_per_byte
from sandbox.errors import CheckpointError
from sandbox.mesh import Mesh
from sandbox.model import build
from sandbox.plan import name_of, plan
from sandbox.runtime import Member, attach, attached, launch
from sandbox.trainer import Trainer

__all__ = ["Log", "device_of", "start", "train"]


def train(member: Member, config: Config, folder: Path, resume: bool) -> float:
    """Train on this rank; report through `member.send` on rank 0 -> the last validation loss, in nats a token."""
    device = torch.device(member.device)
    mesh = Mesh(config.mesh.degrees, member.rank, device.type, Recorder(board=member.board))
    corpus = Corpus.load(config.data, config.model.vocab)
    trainer = Trainer(config, mesh, device, corpus)
    send: Callable[[dict[str, Any]], None] = member.send if member.rank == 0 else lambda message: None
    if resume:
        checkpoint.restore(trainer, checkpoint.latest(folder / "checkpoints"))
    send({"run": _facts(trainer)})
    every, settings = config.train.eval_every, config.run
    loss = float("nan")
    beside = settings.checkpoint_async and settings.checkpoint_every > 0
    with checkpoint.Saver(folder / "checkpoints", keep=settings.checkpoint_keep, asynchronous=beside) as saver:
        for step in trainer.run():
            send(asdict(step))
            done = step.step == config.train.steps
            if done or (every and step.step % every == 0):
                loss = trainer.validate()
                send({"step": step.step, "validation_loss": loss, "bits_per_byte": bits_per_byte(loss)})
            if settings.checkpoint_every and (done or step.step % settings.checkpoint_every == 0):
                saver.save(trainer)
    return loss


def start(config: Config, folder: Path, *, resume: bool = False) -> float:
    """Train as one rank of torchrun, or launch the whole world here -> the last validation loss, in nats a token."""
    plan(config)
    kept, notes = folder / "checkpoints", []
    if resume:
        found = checkpoint.latest(kept)
        checkpoint.check(found, config)
        notes = [f"going on from {found}", *checkpoint.changes(found, config)]
    elif kept.exists() and any(kept.iterdir()):
        raise CheckpointError(
            f"{kept}: holds checkpoints of an earlier run. Go on from there with --resume, name another --folder, "
            "or remove it."
        )
    how: dict[str, Any] = {"timeout": config.run.timeout, "device": device_of(config)}
    with Log(folder, config.train.steps, append=resume, notes=notes) as log:
        if attached():
            return attach(config.mesh.world, train, config, folder, resume, on_message=log.take, **how)
        return launch(config.mesh.world, train, config, folder, resume, on_message=log.take, **how)[0]


def device_of(config: Config) -> str:
    """`cuda` where the config asks for it, or leaves the choice and each rank on this machine has a GPU; else `cpu`."""
    if config.run.device != "auto":
        return config.run.device
    wanted = 1 if attached() else config.mesh.world
    return "cuda" if torch.cuda.device_count() >= wanted else "cpu"


class Log:
    """Shows the messages of rank 0, and writes them to `folder`/metrics.jsonl from the first one on, a line each."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        *,
        append: bool = False,
        notes: Sequence[str] = (),
        console: Console | None = None,
    ) -> None:
        self.folder, self.steps, self.append, self.notes = folder, steps, append, notes
        self.console = console or Console(highlight=False)
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
            self._file.close()

    def take(self, rank: int, message: dict[str, Any]) -> None:
        """One message of a rank."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / "metrics.jsonl").open("a" if self.append else "w", encoding="utf-8")
            if self.console.is_terminal:
                self._bar.start()
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()
        if "run" in message:
            facts = message["run"]
            self._entropy = facts["unigram_entropy"]
            self.console.print(
                f"{facts['name']}: {facts['parameters']:,} parameters, {facts['strategy']} on {facts['world']} ranks "
                f"({facts['mesh']}), {facts['device']}\n{facts['corpus']}",
                soft_wrap=True,
            )
            for note in self.notes:
                self.console.print(note, soft_wrap=True)
        elif "validation_loss" in message:
            loss, bits = message["validation_loss"], message["bits_per_byte"]
            self.console.print(
                f"step {message['step']}  validation loss {loss:.4f}, {bits:.3f} bits per byte "
                f"(unigram entropy {self._entropy:.4f})",
                soft_wrap=True,
            )
        else:
            self._show(message)

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
