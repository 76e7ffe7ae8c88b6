"""When a rank computed and when its collectives were under way, in one step."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from torch import Tensor, nn

from sandbox.recorder import Board
from sandbox.trainer import Trainer
from sandbox.verdict import Span

__all__ = ["Timeline", "align"]


class Timeline:
    """`with Timeline(trainer) as spans: trainer.train_step()`: afterwards, `spans` holds what this rank did, by start.

    Compute spans are `forward P` and `backward P` of each part P of the model (embed, blocks.0, ..., head) and
    `optimizer`, less what the rank spent waiting for a collective. Backward of a part ends where that of the part
    before it begins; `backward` alone is what is left to do when it is over. Collectives are those of comm.py, and
    those of libraries under `Traffic`, from launch until their bytes have come; one whose end is not told is left out.

    Times are those of the machine's clock, the same for all its processes: `align` makes them seconds of the step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._recorder = trainer, trainer.mesh.recorder
        self._undo = ExitStack()
        self._spans: list[Span] = []
        self._computed: list[tuple[str, float, float]] = []
        self._name, self._since = "", 0.0  # what the rank is at, if anything, and since when
        self._outer: list[str] = []  # what it goes on with after that

    def __enter__(self) -> list[Span]:
        trainer, recorder, optimizer = self._trainer, self._recorder, self._trainer.optimizer
        reduce_grads = trainer.program.reduce_grads

        def reduce() -> None:
            self._switch("backward")
            reduce_grads()
            self._switch("")

        self._set(trainer, "program", replace(trainer.program, reduce_grads=reduce))
        self._set(recorder, "detailed", True)
        self._set(recorder, "board", _Waits(self, recorder.board))
        self._first = len(recorder.events)
        for name, module in _parts(trainer.program.model):
            self._watch(name, module)
        self._undo.callback(optimizer.register_step_pre_hook(lambda *_: self.begin("optimizer")).remove)
        self._undo.callback(optimizer.register_step_post_hook(lambda *_: self.end()).remove)
        return self._spans

    def __exit__(self, *error: object) -> None:
        self._switch("")
        self._undo.close()
        self._spans += [Span(lane="compute", name=name, start=start, end=end) for name, start, end in self._computed]
        self._spans += [
            Span(lane="collective", name=f"{e.op} {e.axis}", start=e.start, end=e.end, bytes=round(e.bytes))
            for e in self._recorder.events[self._first :]
            if e.end
        ]
        self._spans.sort(key=lambda span: span.start)

    def begin(self, name: str) -> None:
        """The rank is at `name` now ("": it waits), and goes on with what it was at when that ends."""
        self._outer.append(self._name)
        self._switch(name)

    def end(self) -> None:
        """What was begun last ends."""
        self._switch(self._outer.pop())

    def _switch(self, name: str) -> None:
        now = perf_counter()
        if self._name:
            self._computed.append((self._name, self._since, now))
        self._name, self._since = name, now

    def _watch(self, name: str, module: nn.Module) -> None:
        """Registered last, these run inside the hooks of strategies, which gather before and free after."""

        def after(module: nn.Module, args: Any, out: Any) -> None:
            self.end()
            if isinstance(out, Tensor) and out.requires_grad:
                out.register_hook(lambda grad: self._switch(f"backward {name}"))

        self._undo.callback(module.register_forward_pre_hook(lambda *_: self.begin(f"forward {name}")).remove)
        self._undo.callback(module.register_forward_hook(after).remove)

    def _set(self, owner: object, name: str, value: object) -> None:
        self._undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def align(ranks: Sequence[Sequence[Span]]) -> list[list[Span]]:
    """The same spans in seconds since the first of all ranks began."""
    zero = min((span.start for spans in ranks for span in spans), default=0.0)
    return [
        [span.model_copy(update={"start": span.start - zero, "end": span.end - zero}) for span in spans]
        for spans in ranks
    ]


@dataclass
class _Waits:
    """A board that cuts what is written on it, the rank's waits, out of a timeline; then writes it on `board`."""

    timeline: Timeline
    board: Board | None

    def start(self, members: int, op: str, axis: str, shape: str) -> None:
        if self.board:
            self.board.start(members, op, axis, shape)

    def enter(self, number: int, op: str, axis: str, shape: str) -> None:
        self.timeline.begin("")
        if self.board:
            self.board.enter(number, op, axis, shape)

    def leave(self) -> None:
        if self.board:
            self.board.leave()
        self.timeline.end()

    def alive(self) -> None:
        if self.board:
            self.board.alive()


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The transformer inside whatever wraps it, part by part: embed, blocks.0, ..., norm, head."""
    inner = next(module for module in model.modules() if "blocks" in dict(module.named_children()))
    for name, child in inner.named_children():
        if name == "blocks":
            yield from ((f"blocks.{key}", block) for key, block in child.named_children())
        elif name != "dropout":
            yield name, child
