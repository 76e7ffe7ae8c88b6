"""In what order a rank of a pipeline does its actions: a generator for each schedule.

    (ranks P, rank, microbatches, stages) -> actions

schedules.py says what an action needs and what the schedules cost, makes them, and checks them.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal, NamedTuple

__all__ = ["LOOPED", "ORDERS", "VS", "Action", "Kind", "Order"]

Kind = Literal["F", "B", "W"]


class Action(NamedTuple):
    """What a rank does at once."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} {self.stage} {self.microbatch}"


def _all_forward(ranks: int, rank: int, microbatches: int, stages: int) -> Iterator[Action]:
    """All forwards, chunk by chunk, then all backwards."""
    forwards, backwards = _by_chunk(ranks, rank, microbatches, stages, group=microbatches)
    return _alternate(forwards, backwards, warmup=len(forwards))


def _1f1b(ranks: int, rank: int, microbatches: int, stages: int) -> Iterator[Action]:
    """Interleaved with one chunk: P - 1 - rank forwards, then one of each."""
    forwards, backwards = _by_chunk(ranks, rank, microbatches, stages, group=microbatches)
    return _alternate(forwards, backwards, warmup=ranks - 1 - rank)


def _interleaved(ranks: int, rank: int, microbatches: int, stages: int) -> Iterator[Action]:
    """P microbatches through each chunk in turn. The warm-up lasts until the first of them comes back."""
    forwards, backwards = _by_chunk(ranks, rank, microbatches, stages, group=ranks)
    return _alternate(forwards, backwards, warmup=2 * (ranks - 1 - rank) + stages - ranks)


def _zb_h1(ranks: int, rank: int, microbatches: int, stages: int) -> Iterator[Action]:
    """1F1B whose weights' part lags by `rank` microbatches, which is what fills the bubble at the end."""
    late: deque[Action] = deque()
    for action in _1f1b(ranks, rank, microbatches, stages):
        yield action
        if action.kind == "B":
            late.append(_weights(action))
            if len(late) > rank:
                yield late.popleft()
    yield from late


def _zbv(ranks: int, rank: int, microbatches: int, stages: int) -> Iterator[Action]:
    """Forwards down and up the V, then F B W of either arm in turn; weights' parts last, where a rank would wait."""
    down, up = (_Counter(stage) for stage in (rank, stages - 1 - rank))
    for _ in range(2 * (ranks - rank) - 1):
        yield down.next("F")
    for _ in range(rank):
        yield up.next("F")
        yield down.next("F")
    for _ in range(ranks - rank):
        yield from (up.next("F"), up.next("B"), up.next("W"))
    while up.count["F"] < down.count["F"] or down.count["F"] < microbatches:
        if down.count["F"] < microbatches:
            yield down.next("F")
        yield from (down.next("B"), down.next("W"), up.next("F"), up.next("B"), up.next("W"))
    for _ in range(rank):
        yield from (up.next("B"), down.next("B"))
    for _ in range(ranks - rank):
        yield from (down.next("B"), down.next("W"))
    for arm in (up, down):
        while arm.count["W"] < microbatches:
            yield arm.next("W")


def _dualpipe_v(ranks: int, rank: int, microbatches: int, stages: int) -> Iterator[Action]:
    """The eight steps of DualPipeV. A forward and a backward that it overlaps stand here one after the other."""
    down, up = (_Counter(stage) for stage in (rank, stages - 1 - rank))
    behind = ranks - 1 - rank  # ranks deeper in the V
    late: deque[Action] = deque()

    def backward(arm: _Counter, *, split: bool = False) -> Action:
        action = arm.next("B")
        if split:
            late.append(_weights(action))
        return action

    for _ in range(2 * behind):
        yield down.next("F")
    for _ in range(rank + 1):
        yield from (down.next("F"), up.next("F"))
    for _ in range(behind):
        yield from (backward(up, split=True), late.popleft(), up.next("F"))
    for _ in range(microbatches - 2 * ranks + rank + 1):
        yield from (down.next("F"), backward(up), up.next("F"), backward(down))
    for _ in range(behind):
        yield from (backward(up), up.next("F"), backward(down))
    for step in range(rank + 1):
        half = (rank + 1) // 2
        yield backward(up, split=step > half or (step == half and rank % 2 == 1))
        yield backward(down, split=step >= half)
    for _ in range(behind):
        yield late.popleft()
        yield backward(down, split=True)
    yield from late


class _Counter:
    """Hands out the actions of a stage, microbatch by microbatch."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.count: defaultdict[Kind, int] = defaultdict(int)

    def next(self, kind: Kind) -> Action:
        action = Action(kind, self.stage, self.count[kind])
        self.count[kind] += 1
        return action


def _by_chunk(ranks: int, rank: int, microbatches: int, stages: int, group: int) -> tuple[list[Action], list[Action]]:
    """All forwards and all backwards of a rank in a loop: `group` microbatches through each chunk, then the next."""
    mine = range(rank, stages, ranks)
    groups = [range(start, min(start + group, microbatches)) for start in range(0, microbatches, group)]
    forwards = [Action("F", stage, m) for some in groups for stage in mine for m in some]
    backwards = [Action("B", stage, m) for some in groups for stage in reversed(mine) for m in some]
    return forwards, backwards


def _alternate(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> Iterator[Action]:
    """`warmup` forwards, then forwards and backwards in turn, then the backwards that are left."""
    yield from forwards[:warmup]
    turns: Iterable[tuple[Action, Action]] = zip(forwards[warmup:], backwards, strict=False)
    yield from chain(*turns)
    yield from backwards[max(0, len(forwards) - warmup) :]


def _weights(backward: Action) -> Action:
    return backward._replace(kind="W")


Order = Callable[[int, int, int, int], Iterator[Action]]
ORDERS: dict[str, tuple[Order, Callable[[int], int], Callable[[int], int]]] = {
    # name: order, least number of microbatches that it is made for, and what must divide that number
    "gpipe": (_all_forward, lambda ranks: 1, lambda ranks: 1),
    "1f1b": (_1f1b, lambda ranks: 1, lambda ranks: 1),
    "interleaved": (_interleaved, lambda ranks: 1, lambda ranks: ranks),
    "breadth_first": (_all_forward, lambda ranks: 1, lambda ranks: 1),
    "zb_h1": (_zb_h1, lambda ranks: 1, lambda ranks: 1),
    "zbv": (_zbv, lambda ranks: 2 * ranks - 1, lambda ranks: 1),
    "dualpipe_v": (_dualpipe_v, lambda ranks: 2 * ranks, lambda ranks: 1),
}

LOOPED = ("interleaved", "breadth_first")
"""Schedules with any number of stages a rank."""
VS = ("zbv", "dualpipe_v")
"""Schedules with two stages a rank, as a V."""
