"""What one rank did in three steps, taken down for comparison. Runs inside the rank; imports nothing of the verdict."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.config import Config
from sandbox.data import Corpus
from sandbox.layout import Layout, local
from sandbox.measure import Figures, Peak, timed
from sandbox.mesh import Mesh
from sandbox.program import Program
from sandbox.recorder import Recorder
from sandbox.runtime import Member
from sandbox.trainer import Trainer

__all__ = ["Capture", "Piece", "Pieces", "Subject", "capture"]


@dataclass(frozen=True)
class Piece:
    """A local tensor and its place."""

    layout: Layout
    local: Tensor


@dataclass(frozen=True, eq=False)
class Pieces(Mapping[str, Piece]):
    """Pieces by name, end to end in one tensor `flat`: many small ones take ten times as long to send and compare."""

    layouts: Mapping[str, Layout]
    flat: Tensor

    @classmethod
    def of(cls, layouts: Mapping[str, Layout], tensors: Iterable[Tensor]) -> Self:
        """A copy of `tensors`, on the CPU, in the order of `layouts`."""
        flats = [local(tensor.detach()).reshape(-1) for tensor in tensors]
        odd = [name for (name, layout), flat in zip(layouts.items(), flats, strict=True) if layout.numel != len(flat)]
        assert not odd, f"these do not have the sizes that their layouts say: {', '.join(odd)}"
        return cls(layouts, torch.cat(flats).cpu() if flats else torch.empty(0))

    @cached_property
    def _split(self) -> dict[str, Tensor]:
        return dict(zip(self.layouts, self.flat.split([layout.numel for layout in self.layouts.values()]), strict=True))

    def __getitem__(self, name: str) -> Piece:
        layout = self.layouts[name]
        return Piece(layout, self._split[name].view(layout.local_shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self.layouts)

    def __len__(self) -> int:
        return len(self.layouts)


class Subject(Protocol):
    """A training of something else than the config's model and corpus. It is sent to the ranks, so it pickles."""

    def open(self, config: Config, mesh: Mesh, device: torch.device) -> tuple[Corpus, Program]:
        """Its batches, and the program of this rank that the data axis is folded over."""


@dataclass
class Capture(Figures):
    """One rank's part of a run, step by step. Tensors are local and on the CPU; nothing was gathered.

    The figures are those of the last step, but for the peak: that of the last but one, if it is measured.
    """

    place: dict[str, int] = field(default_factory=dict)  # axis -> this rank's coordinate
    losses: list[float] = field(default_factory=list)  # this rank's share
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    gradients: list[Pieces] = field(default_factory=list)  # before clipping
    parameters: list[Pieces] = field(default_factory=list)  # first values, then after each step
    buffers: list[Pieces] = field(default_factory=list)  # after each step: state that no optimizer updates
    tokens: list[list[tuple[int, int]]] = field(default_factory=list)  # (row, checksum) of the rows seen


def capture(
    member: Member,
    config: Config,
    prepare: Callable[[Trainer], Any] | None = None,
    subject: Subject | None = None,
    measure: bool = False,
) -> Capture:
    """Train for `train.steps` steps and take everything down. `prepare` may tamper with the trainer first.

    With `measure`, peak memory and a timeline too: the peak of the last step but one; traffic and timeline, which
    measuring it would disturb, of the last.
    """
    recorder = Recorder(board=member.board if member.world > 1 else None)
    device = torch.device(member.device)
    mesh = Mesh(config.mesh.degrees, member.rank, device.type, recorder)
    corpus, start = (
        subject.open(config, mesh, device) if subject else (Corpus.load(config.data, config.model.vocab), None)
    )
    trainer = Trainer(config, mesh, device, corpus, start)
    if prepare:
        prepare(trainer)
    parameters = trainer.program.parameters
    layouts = {name: trainer.program.layout[name] for name in parameters}
    taken = Capture(place={axis: mesh.axis(axis).rank for axis in mesh.degrees})
    taken.parameters.append(Pieces.of(layouts, parameters.values()))
    peak = Peak(trainer.program, trainer.optimizer)
    for step in range(config.train.steps):
        last = step == config.train.steps - 1
        weigh = peak if measure and step == config.train.steps - 2 else nullcontext()
        batch = trainer.batch()
        taken.tokens.append(_digest(trainer.program.shard_batch(batch)))
        with timed(trainer, taken, timeline=measure) if last else nullcontext():
            with weigh:
                taken.losses.append(trainer.compute_gradients(batch).item())
            taken.gradients.append(Pieces.of(layouts, [p.grad for p in parameters.values() if p.grad is not None]))
            with weigh:
                taken.norms.append(trainer.update().item())
        taken.rates.append(trainer.optimizer.param_groups[0]["lr"])
        taken.parameters.append(Pieces.of(layouts, parameters.values()))
        taken.buffers.append(_buffers(trainer.program.model))
    taken.peak = peak.bytes
    return taken


def _buffers(model: nn.Module) -> Pieces:
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner  # out of a library's wrapper
    buffers = {name: b for name, b in model.named_buffers() if b.numel() and not b.is_complex()}
    layouts = {name: Layout.whole(tuple(buffer.shape)) for name, buffer in buffers.items()}
    return Pieces.of(layouts, [buffer.double().nan_to_num() for buffer in buffers.values()])  # a mask is inf


def _digest(batch: Batch) -> list[tuple[int, int]]:
    """(row, checksum) of each row; checksums of parts of a row add up to that of the whole, modulo 2**64."""
    mixed = ((batch.tokens * 1_000_003 + batch.targets) * 1_000_003 + batch.positions) * 1_000_003 + batch.columns
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687  # an odd constant; products wrap, as they should
    return list(zip(batch.rows.tolist(), (mixed ^ (mixed >> 32)).sum(1).tolist(), strict=True))
