"""A config as a picture: who holds what, schedule, ring, experts. All of it from what the strategies themselves say."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from sandbox.config import Config, Options
from sandbox.mesh import Mesh
from sandbox.model import build
from sandbox.orders import LOOPED
from sandbox.plan import layouts, name_of, plan, predict
from sandbox.report.cases import drawn
from sandbox.report.columns import exchange, scores, strips, travel
from sandbox.report.schedule import WIDEST, gantt, legend
from sandbox.report.svg import RANKS, Drawing, stack
from sandbox.report.tensors import Box, Drawn, Held, boxes, held, tensors
from sandbox.report.tokens import visit
from sandbox.report.words import size
from sandbox.schedules import SCHEDULES, finish_times, make
from sandbox.verdict import Measured, Verdict

__all__ = ["gallery", "picture", "pictures"]

ORDERS = ("zigzag", "contiguous")


def picture(config: Config, *, alone: bool = True) -> str:
    """The SVG of a config. `alone`: a file of its own; else a part of a page, in the page's theme."""
    drawings = [_head(config)]
    for planned in plan(config):
        schedule = getattr(planned.strategy, "schedule", None)
        if schedule:
            made, name = schedule(config, planned.options), getattr(planned.options, "schedule", "schedule")
            drawn = stack([gantt(made, name, rank_is=_rank(config, "pp")), legend([made])], 12)
            drawings.append(_titled("Who does what when: time from left to right, microbatches by number", drawn))
        columns_of = getattr(planned.strategy, "columns", None)
        if columns_of:
            drawings += _context(config, planned.options, columns_of)
        dealt = getattr(planned.strategy, "dealt", None)
        if dealt:
            text = "Whose tokens go where in a mixture: colours are whose they are, numbers the experts they are for"
            drawings.append(_titled(text, visit(dealt(config), _rank(config, "ep"))))
    drawings += [_tensors(config), _held(config)]
    return stack(drawings).svg(f"{config.name}: {name_of(config)}, {config.mesh}", alone=alone)


def gallery(ranks: int = 4, microbatches: int = 8) -> str:
    """All schedules of a pipeline, one below the other, on one scale."""
    made = {name: make(name, ranks, microbatches, 2 if name in LOOPED else 1) for name in SCHEDULES}
    # A stage's action takes half as long where a rank has two of them.
    costs = {name: (2 / len(schedule.held(0)),) * 3 for name, schedule in made.items()}
    unit = WIDEST / max(max(finish_times(schedule, costs[name]).values()) for name, schedule in made.items())
    drawings = [gantt(schedule, name, costs[name], unit=unit) for name, schedule in made.items()]
    return stack([*drawings, legend(list(made.values()))], 20).svg("schedules of a pipeline")


def pictures(cases: Iterable[Verdict], runs: Sequence[Measured] = ()) -> list[tuple[Measured, str]]:
    """Runs, and of every other native strategy the case on most ranks, with its picture as a part of a page."""
    chosen = drawn(runs, cases, lambda case: bool(case.config) and case.engine == "native")
    return [(case, picture(Config.model_validate(case.config), alone=False)) for case in chosen]


def _head(config: Config) -> Drawing:
    drawing = Drawing()
    drawing.text(0, 13, name_of(config), "head")
    drawing.text(0, 31, f"{config.name}: {config.mesh.world} ranks ({config.mesh})", "quiet")
    return drawing


def _context(config: Config, options: Options, columns_of: Callable[[int, int, str], list[Tensor]]) -> list[Drawing]:
    ranks, sequence, rank = config.mesh.cp.degree, config.data.sequence, _rank(config, "cp")
    orders = {order: [part.tolist() for part in columns_of(sequence, ranks, order)] for order in ORDERS}
    kind, order = getattr(options, "kind", "ring"), getattr(options, "order", ORDERS[0])
    whose = strips({f"{name}, here" if name == order else name: columns for name, columns in orders.items()}, rank)
    drawings = [_titled(f"Who holds which of the {sequence} columns", whose)]
    if kind == "ulysses":
        heads = config.model.heads // config.mesh.tp.degree
        return [*drawings, _titled("Who holds what of queries, keys and values", exchange(orders[order], heads, rank))]
    both = Drawing()
    for number, (name, columns) in enumerate(orders.items()):
        both.place(scores(name, columns, steps=kind == "ring", rank_is=rank), 370 * number, 0)
    numbered = ", numbered by the step of the ring in which it is done" if kind == "ring" else ""
    drawings.append(_titled(f"Who works on which scores{numbered}; and how many each rank works on", both))
    if kind == "ring":
        drawings.append(_titled("Whose keys and values a rank has, step by step", travel(ranks, rank)))
    return drawings


def _tensors(config: Config) -> Drawing:
    world, ranks = config.mesh.world, layouts(config)
    model: dict[str, Drawn] = {}
    shapes = dict(build(config.model, config.train.dtype).named_parameters())
    for name in dict.fromkeys([*shapes, *(name for rank in ranks for name in rank)]):
        holders: dict[tuple[Box, ...], list[int]] = defaultdict(list)
        for rank, layout in enumerate(ranks):
            if name in layout:
                lies = layout[name]
                holders[tuple(boxes(lies.shape, lies.offset, lies.size, lies.span))].append(rank)
        if any(holders):
            shape = next(layout[name].shape for layout in ranks if name in layout)
            model[name] = Drawn(shape, {tuple(who): parts for parts, who in holders.items() if parts})
    drawing = tensors(model, world)
    key = Drawing()
    entries = [(f"r{rank % RANKS}", f"rank {rank}") for rank in range(min(world, RANKS))]
    everywhere = world > 1 and any(len(who) == world for drawn in model.values() for who in drawn.parts)
    key.legend(0, 10, [*entries, ("all", "all ranks alike")] if everywhere else entries)
    return stack([_titled("Who updates which part of every tensor", drawing), key], 14)


def _held(config: Config) -> Drawing:
    ranks, alone = predict(config), predict(config.reference())[0].memory
    kinds = [Held(kind, [rank.memory[kind] for rank in ranks], whole) for kind, whole in alone.items()]
    drawing = _titled("What a rank holds after a step, of what the unsharded model would", held(kinds, _places(config)))
    most = {key: max(rank.traffic.get(key, 0) for rank in ranks) for rank in ranks for key in rank.traffic}
    if most:
        sent = ", ".join(f"{key} {size(count)}" for key, count in most.items())
        drawing.text(0, drawing.height + 20, f"Sent in a step, by the rank that sends most: {sent}", "quiet")
    return drawing


def _places(config: Config) -> list[str]:
    """Each rank's coordinates along the axes that have several ranks, if there are several such axes."""
    axes = [axis for axis, degree in config.mesh.degrees.items() if degree > 1]
    if len(axes) < 2:
        return [""] * config.mesh.world
    meshes = [Mesh(config.mesh.degrees, rank) for rank in range(config.mesh.world)]
    return [", ".join(f"{axis.removeprefix('dp_')} {mesh.axis(axis).rank}" for axis in axes) for mesh in meshes]


def _rank(config: Config, axis: str) -> str:
    """What a place along an axis is called: `rank`, if there are no others, else by the axis."""
    return "rank" if config.mesh.world == config.mesh.degrees[axis] else axis


def _titled(title: str, drawing: Drawing) -> Drawing:
    head = Drawing()
    head.text(0, 10, title, "title")
    return stack([head, drawing], 10)
