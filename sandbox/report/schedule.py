"""A pipeline's schedule to look at: a row a rank, time from left to right, as text or as a drawing."""

from collections.abc import Sequence

from sandbox.orders import Action
from sandbox.report.svg import Drawing
from sandbox.schedules import Schedule, bubble, finish_times, peaks

__all__ = ["WIDEST", "gantt", "legend", "text"]

Costs = tuple[float, float, float]
ROOM, ROW = 56, 24
WIDEST = 800
"""Pixels of the longest schedule."""


def text(schedule: Schedule, width: int = 120) -> str:
    """One cell a unit of time, with F = B = W = 1: `F0` is forward on microbatch 0, `F0b` that of a second stage.

    What goes beyond `width` characters is left out.
    """
    ends = finish_times(schedule)
    cells: list[dict[int, str]] = [{} for _ in schedule.orders]
    for rank, order in enumerate(schedule.orders):
        for action in order:
            end = round(ends[action])
            cells[rank] |= {at: _label(schedule, rank, action) for at in range(end - round(schedule.cost(action)), end)}
    size = max(len(cell) for row in cells for cell in row.values())
    length = round(max(ends.values()))
    room = max(1, (width - 12) // (size + 1))
    lines = []
    for rank, row in enumerate(cells):
        shown = " ".join(row.get(at, ".").ljust(size) for at in range(min(length, room)))
        lines.append(f"rank {rank:<3} {shown}{'...' if length > room else ''}".rstrip())
    return "\n".join([*lines, _summary(schedule)])


def gantt(
    schedule: Schedule, name: str, costs: Costs = (1, 1, 1), *, unit: float = 0, rank_is: str = "rank"
) -> Drawing:
    """A row a rank, time from left to right, `unit` pixels a unit of it; what no action covers is the bubble."""
    drawing, ends = Drawing(), finish_times(schedule, costs)
    length, top = max(ends.values()), 22
    unit = unit or min(22.0, WIDEST / length)
    drawing.text(0, 10, name, "title")
    drawing.text(12 + 7 * len(name), 10, _summary(schedule, costs), "quiet")
    for rank, order in enumerate(schedule.orders):
        y = top + ROW * rank
        drawing.text(0, y + 15, f"{rank_is} {rank}", "quiet")
        drawing.rect(ROOM, y + 1, unit * length, ROW - 4, "idle", f"{rank_is} {rank} is idle")
        for action in order:
            long = schedule.cost(action, costs) * unit
            x = ROOM + ends[action] * unit - long
            later = schedule.held(rank).index(action.stage) > 0
            drawing.rect(x + 0.5, y + 1, long - 1, ROW - 4, action.kind.lower() + "2" * later, _words(action))
            if long > 7 * len(str(action.microbatch)):
                drawing.text(x + long / 2, y + 14.5, str(action.microbatch), "on", "middle")
    return drawing


def legend(schedules: Sequence[Schedule]) -> Drawing:
    """What the colours of `gantt` stand for."""
    drawing, split = Drawing(), any(schedule.split for schedule in schedules)
    entries = [("f", "forward"), ("b", "backward of inputs" if split else "backward")]
    entries += [("w", "backward of weights")] * split
    if any(len(schedule.held(0)) > 1 for schedule in schedules):
        entries.append(("f2", "another shade: second and further stages of the rank"))
    drawing.legend(ROOM, 10, [*entries, ("idle", "idle")])
    return drawing


def _label(schedule: Schedule, rank: int, action: Action) -> str:
    held = schedule.held(rank)
    return f"{action.kind}{action.microbatch}" + (chr(ord("a") + held.index(action.stage)) if len(held) > 1 else "")


def _words(action: Action) -> str:
    kind = {"F": "forward", "B": "backward", "W": "gradients of weights"}[action.kind]
    return f"{kind}, stage {action.stage}, microbatch {action.microbatch}"


def _summary(schedule: Schedule, costs: Sequence[float] = (1, 1, 1)) -> str:
    forward, inputs, weights = costs
    most = peaks(schedule)
    live = f"{most[0]:g}" if len(set(most)) == 1 else f"{min(most):g} to {max(most):g}"
    return f"bubble {bubble(schedule, (forward, inputs, weights)):.1%}, microbatches kept: {live}"
