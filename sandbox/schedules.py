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

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain

from sandbox.orders import ORDERS, VS, Action

__all__ = ["SCHEDULES", "Schedule", "borders", "bubble", "check", "finish_times", "homes", "make", "peaks"]

SCHEDULES = tuple(ORDERS)


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
        return borders(self.homes, rank)

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


def homes(name: str, ranks: int, stages: int) -> list[int]:
    """The rank of each of `stages` under the schedule `name`: in a loop, or in a V there and back."""
    return [min(s, stages - 1 - s) for s in range(stages)] if name in VS else [s % ranks for s in range(stages)]


def borders(home: Sequence[int], rank: int) -> int:
    """Borders between a stage of `rank` and one of another, given the rank of each stage."""
    neighbours = [stage + way for stage, holder in enumerate(home) if holder == rank for way in (-1, 1)]
    return sum(0 <= stage < len(home) and home[stage] != rank for stage in neighbours)


@lru_cache
def make(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The schedule of that name, checked. `chunks`: stages a rank, where the schedule leaves a choice."""
    order, least, multiple = ORDERS[name]
    stages = ranks * (2 if name in VS else chunks)
    wanted = max(microbatches, least(ranks))
    wanted += -wanted % multiple(ranks)
    orders = [(a for a in order(ranks, rank, wanted, stages) if a.microbatch < microbatches) for rank in range(ranks)]
    schedule = Schedule(tuple(homes(name, ranks, stages)), tuple(map(tuple, orders)))
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
