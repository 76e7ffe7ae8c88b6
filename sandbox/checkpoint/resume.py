"""What must be the same for a training to go on, and going on."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from sandbox.checkpoint.folder import ADVICE, complete, facts, problems, set_aside
from sandbox.checkpoint.state import put, wanted
from sandbox.checkpoint.storage import Piece, index, read
from sandbox.checkpoint.together import Together
from sandbox.config import Config, Model
from sandbox.data import Corpus
from sandbox.errors import CheckpointError
from sandbox.trainer import Trainer

__all__ = ["about", "candidate", "changes", "check", "restore", "restore_newest"]

SAME = {
    "model": tuple(name for name in Model.model_fields if name != "init"),
    "data": ("sequence", "layout", "mask", "held_out", "text"),
    "train": ("seed", "batch", "optimizer", "dtype"),
}
"""Settings without which it would be another training: other tensors, other numbers, or another order of the data.

Mesh, engine and microbatches are a matter of layout. The rest (steps, rates, decay, clipping) is free to change.
"""


def about(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {"step": trainer.step, "config": _told(trainer.config, trainer.corpus)}


def check(checkpoint: Path, config: Config, corpus: Corpus | None = None) -> None:
    """See that a training of `config` can go on from `checkpoint`, before anything starts. Raises CheckpointError."""
    saved, own = facts(checkpoint)["config"], _told(config, corpus)
    unlike = [
        f"{checkpoint}: was saved with {section}.{name} {_shown(saved[section][name])}, this run has "
        f"{_shown(own[section][name])}. Resume with {section}.{name}: {_shown(saved[section][name])}."
        for section, names in SAME.items()
        for name in names
        if name in saved[section] and name in own[section] and saved[section][name] != own[section][name]
    ]  # what one of them does not tell is not compared
    if unlike:
        raise CheckpointError("\n".join(unlike))


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Bring the trainer to the state that `checkpoint` holds, whatever layout saved it. All ranks call it.

    Raises CheckpointError: damaged, or saved by another training. The trainer is then as it was.
    """
    together = Together.of(trainer)
    if wrong := _problems(trainer, checkpoint, together):
        raise CheckpointError("\n".join(wrong))
    _load(trainer, checkpoint, together)


def _problems(trainer: Trainer, checkpoint: Path, together: Together) -> list[str]:
    """What is wrong with the files, the same on all ranks, each of which reads its share."""
    rank, world = trainer.mesh.rank, trainer.mesh.world
    found = together(lambda: problems(checkpoint, rank, world, together.moved))
    return list(dict.fromkeys(problem for part in found for problem in part))


def _load(trainer: Trainer, checkpoint: Path, together: Together) -> None:
    check(checkpoint, trainer.config, trainer.corpus)
    if isinstance(trainer.program.model, DistributedDataParallel):  # its buckets are cut anew after its first backward
        trainer.compute_gradients(trainer.batch())
        trainer.zero_grad()
    pieces: dict[str, Piece] = {}

    def fetch() -> None:
        pieces.update(wanted(trainer, index(checkpoint)))
        read(checkpoint, pieces, together.moved)

    together(fetch)
    put(trainer, pieces)
    trainer.step = facts(checkpoint)["step"]


def restore_newest(trainer: Trainer, folder: Path, warn: Callable[[str], None] | None = None) -> None:
    """As `restore`, from the newest checkpoint in `folder` as the first rank sees it; without any, do nothing.

    With `warn`, from the newest good one. Those that are damaged are then set aside, so that the training can come by
    their steps again, and told.

    Raises CheckpointError: damaged; with `warn`, all of them.
    """
    together, first = Together.of(trainer), trainer.mesh.rank == 0
    found = together(lambda: complete(folder)[::-1] if first else [])[0]
    damaged: dict[Path, list[str]] = {}
    for checkpoint in found if warn else found[:1]:
        if not (wrong := _problems(trainer, checkpoint, together)):
            break
        damaged[checkpoint] = wrong
    else:
        if damaged:
            raise CheckpointError("\n".join(problem for wrong in damaged.values() for problem in wrong))
        return
    _load(trainer, checkpoint, together)
    aside = together(lambda: [set_aside(path) for path in damaged] if first else [])[0]
    for place, wrong in zip(aside, damaged.values(), strict=True):
        told = "\n".join(problem.removesuffix(ADVICE).rstrip() for problem in wrong)
        assert warn
        warn(f"{told} It is set aside as {place.name}, and the run goes on from {checkpoint.name}.")


def candidate(folder: Path, config: Config) -> Path | None:
    """The checkpoint that a training of `config` would go on from if none is damaged; None if there is none at all.

    Raises CheckpointError: it is of another training, or not one can be read.
    """
    unreadable: CheckpointError | None = None
    for checkpoint in reversed(complete(folder)):
        try:
            facts(checkpoint)
        except CheckpointError as error:
            unreadable = unreadable or error
            continue
        check(checkpoint, config)
        return checkpoint
    if unreadable:
        raise unreadable
    return None


def changes(checkpoint: Path, config: Config) -> list[str]:
    """Settings that are other ones than when `checkpoint` was saved, for people: `train.lr 0.003 -> 0.001`."""
    before = facts(checkpoint)["config"]["train"]
    now = config.train.model_dump(mode="json")
    return [
        f"train.{name} {before[name]} -> {value}" for name, value in now.items() if before.get(name, value) != value
    ]


def _shown(value: Any) -> str:
    return str(value).lower() if value in (None, True, False) else str(value)


def _told(config: Config, corpus: Corpus | None) -> dict[str, Any]:
    """The config, with what it leaves to be worked out."""
    tree, model = config.model_dump(mode="json"), config.model
    tree["model"] |= {"kv_heads": model.groups, "hidden": model.mlp_hidden}
    del tree["run"], tree["data"]["files"]  # where it stood; the text itself is what counts
    if corpus:
        tree["data"]["text"] = _digest(corpus)
    return tree


def _digest(corpus: Corpus) -> str:
    """Names a text by its content."""
    content = hashlib.sha256()
    for part in (corpus.train, corpus.held_out):
        content.update(part.tokens.numpy().tobytes())
    return content.hexdigest()[:16]
