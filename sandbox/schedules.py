"""Pipeline schedules as data: for each rank, the order of its actions. Pure functions make, check and measure them.

An action is forward, backward or the weights' part of backward of one virtual stage on one microbatch:

    F s m    forward of stage s on microbatch m                    needs F s-1 m
    B s m    backward: the gradient of the stage's input, and      needs F s m and B s+1 m
             those of its weights unless a W of s and m follows
    W s m    the gradients of the stage's weights                  needs B s m

Who holds which stage, with P ranks: in a loop, rank s mod P; in a V, rank s, and on the way back rank 2P-1-s, so that
the first rank holds the first and the last stage. What is sent follows: an action whose need was met on another rank
waits for it, and sends never wait. `finish_times` runs a schedule by this rule, so one that would deadlock is found
before it starts.

    schedule       stages    makespan with F = B = W = 1, in actions of one stage       live microbatches, at most
    gpipe          P         3M + 3(P-1)                                                M
    1f1b           P         3M + 3(P-1)                                                P
    interleaved    v P       3vM + 3(P-1)    (P divides M)                              P + (P-1)/v
    breadth_first  v P       3vM + 3(P-1)    (M >= P)                                   M
    zb_h1          P         3M + (P-1)      (M >= P)                                   P
    zbv            2 P, V    6M + (P-1)      (M >= 2P)                                  P
    dualpipe_v     2 P, V    6M + (P-1)      (M >= 2P)                                  P + 1/2

Bubble: the part of the makespan in which a rank is idle: for 1f1b (P-1) / (M + P-1). A live microbatch is one that a
rank keeps activations of; on a rank with v stages, one of a stage counts 1/v. zbv starts each rank a little later than
the one before and ends it as much later: from its first action to its last a rank waits for one action at most.
dualpipe_v is made to run a forward and a backward at once, to hide what either sends; their results then come together,
and the published bubble is 2(P-1). Here one follows the other.

Any number of microbatches will do: where a schedule wants more, or a multiple, it is made for those, and what is not
there is left out.

Sources: Huang et al., "GPipe", 2019; Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters
Using Megatron-LM", SC 2021 (1F1B with flush, interleaved); Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2023; Qi
et al., "Zero Bubble Pipeline Parallelism", 2023 (H1), and "Pipeline Parallelism with Controllable Memory", 2024 (V);
DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, and its DualPipe, 2025 (DualPipeV).
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Literal, NamedTuple

__all__ = ["LOOPED", "SCHEDULES", "VS", "Action", "Schedule", "bubble", "check", "finish_times", "make", "peaks"]

Kind = Literal["F", "B", "W"]


class Action(NamedTuple):
    """What a rank does at once."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} {self.stage} {self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """The rank that holds each virtual stage, and what each rank does, in order."""

    homes: tuple[int, ...]
    orders: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        """Virtual stages, over all ranks."""
        return len(self.homes)

    @property
    def ends(self) -> tuple[int, int]:
        """The ranks of the first and of the last stage."""
        return self.homes[0], self.homes[-1]

    def held(self, rank: int) -> list[int]:
        """The stages of a rank."""
        return [stage for stage, home in enumerate(self.homes) if home == rank]

    def messages(self, rank: int) -> int:
        """What a rank sends for each microbatch: hidden states forward and gradients back, to other ranks."""
        neighbours = [stage + way for stage in self.held(rank) for way in (-1, 1)]
        return sum(0 <= stage < self.stages and self.homes[stage] != rank for stage in neighbours)

    @cached_property
    def split(self) -> frozenset[tuple[int, int]]:
        """(stage, microbatch) whose weights' gradients are an action of their own."""
        return frozenset((a.stage, a.microbatch) for a in chain(*self.orders) if a.kind == "W")

    @cached_property
    def places(self) -> dict[Action, int]:
        """When its rank does an action: first, second, ..."""
        return {action: place for order in self.orders for place, action in enumerate(order)}

    def needs(self, action: Action) -> Iterator[Action]:
        """What must have happened before, here or on another rank."""
        kind, stage, microbatch = action
        if kind == "F" and stage:
            yield Action("F", stage - 1, microbatch)
        if kind == "B":
            yield Action("F", stage, microbatch)
            if stage + 1 < self.stages:
                yield Action("B", stage + 1, microbatch)
        if kind == "W":
            yield Action("B", stage, microbatch)

    def cost(self, action: Action, costs: tuple[float, float, float] = (1, 1, 1)) -> float:
        """How long an action takes, given how long F, B (of inputs) and W take."""
        forward, inputs, weights = costs
        if action.kind == "F":
            return forward
        if action.kind == "W":
            return weights
        return inputs if (action.stage, action.microbatch) in self.split else inputs + weights


@lru_cache
def make(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The schedule of that name, checked. `chunks`: stages a rank, where the schedule leaves a choice."""
    order, least, multiple = _ORDERS[name]
    stages = ranks * (2 if name in VS else chunks)
    wanted = max(microbatches, least(ranks))
    wanted += -wanted % multiple(ranks)
    homes = [min(s, stages - 1 - s) for s in range(stages)] if name in VS else [s % ranks for s in range(stages)]
    orders = [(a for a in order(ranks, rank, wanted, stages) if a.microbatch < microbatches) for rank in range(ranks)]
    schedule = Schedule(tuple(homes), tuple(map(tuple, orders)))
    check(schedule, microbatches)
    return schedule


def check(schedule: Schedule, microbatches: int) -> None:
    """Raise ValueError unless every rank does all of its stages' work once, in an order that cannot deadlock."""
    for rank, order in enumerate(schedule.orders):
        work = [(stage, microbatch) for stage in schedule.held(rank) for microbatch in range(microbatches)]
        for kind in ("F", "B", "W"):
            done = sorted((a.stage, a.microbatch) for a in order if a.kind == kind)
            wanted = [pair for pair in work if kind != "W" or pair in schedule.split]
            if done != wanted:
                odd = min(set(done) ^ set(wanted) or {pair for pair in done if done.count(pair) > 1})
                raise ValueError(f"rank {rank} does {kind} {odd[0]} {odd[1]} {done.count(odd)} times")
    finish_times(schedule)


def finish_times(schedule: Schedule, costs: tuple[float, float, float] = (1, 1, 1)) -> dict[Action, float]:
    """When each action ends, if each begins as soon as its rank is free and what it needs has happened.

    Raises ValueError where ranks would wait for ever.
    """
    ends: dict[Action, float] = {}
    queues = [deque(order) for order in schedule.orders]
    free = [0.0] * len(queues)
    moving = True
    while moving:
        moving = False
        for rank, queue in enumerate(queues):
            while queue and all(need in ends for need in schedule.needs(queue[0])):
                action = queue.popleft()
                begin = max((free[rank], *(ends[need] for need in schedule.needs(action))))
                free[rank] = ends[action] = begin + schedule.cost(action, costs)
                moving = True
    if any(queues):
        stuck = ", ".join(f"rank {rank} before {queue[0]}" for rank, queue in enumerate(queues) if queue)
        raise ValueError(f"the ranks wait for each other: {stuck}")
    return ends


def bubble(schedule: Schedule, costs: tuple[float, float, float] = (1, 1, 1)) -> float:
    """The idle part of all ranks' time."""
    makespan = max(finish_times(schedule, costs).values())
    busy = sum(schedule.cost(action, costs) for action in chain(*schedule.orders))
    return 1 - busy / (makespan * len(schedule.orders))


def peaks(schedule: Schedule) -> list[float]:
    """The most microbatches that each rank keeps activations of; one of v stages on a rank counts 1/v."""
    found = []
    for rank, order in enumerate(schedule.orders):
        live = most = 0
        for kind, stage, microbatch in order:
            live += kind == "F"
            most = max(most, live)
            live -= kind == "W" or (kind == "B" and (stage, microbatch) not in schedule.split)
        found.append(most / len(schedule.held(rank)))
    return found


# Orders: (ranks P, rank, microbatches, stages) -> actions


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
_ORDERS: dict[str, tuple[Order, Callable[[int], int], Callable[[int], int]]] = {
    # name: order, least number of microbatches that it is made for, and what must divide that number
    "gpipe": (_all_forward, lambda ranks: 1, lambda ranks: 1),
    "1f1b": (_1f1b, lambda ranks: 1, lambda ranks: 1),
    "interleaved": (_interleaved, lambda ranks: 1, lambda ranks: ranks),
    "breadth_first": (_all_forward, lambda ranks: 1, lambda ranks: 1),
    "zb_h1": (_zb_h1, lambda ranks: 1, lambda ranks: 1),
    "zbv": (_zbv, lambda ranks: 2 * ranks - 1, lambda ranks: 1),
    "dualpipe_v": (_dualpipe_v, lambda ranks: 2 * ranks, lambda ranks: 1),
}

SCHEDULES = tuple(_ORDERS)
LOOPED = ("interleaved", "breadth_first")
"""Schedules with any number of stages a rank."""
VS = ("zbv", "dualpipe_v")
"""Schedules with two stages a rank, as a V."""
