"""A pipeline's schedule to look at: a row a rank, time from left to right, as text or as a drawing."""

from collections.abc import Sequence
from html import escape

from sandbox.orders import Action
from sandbox.schedules import Schedule, bubble, finish_times, peaks

__all__ = ["svg", "text"]

Costs = tuple[float, float, float]
COLORS = {"F": ("#3a6fb0", "#7ba3d3"), "B": ("#d0693a", "#e5a482"), "W": ("#2b978a", "#79c0b7")}
INK, QUIET = "#1d232c", "#667080"


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


def svg(schedule: Schedule, costs: Costs = (1, 1, 1), unit: float = 22) -> str:
    """A drawing; lighter shades are a rank's second stage and further ones."""
    ends = finish_times(schedule, costs)
    high, left = 26, 56
    width, height = left + unit * max(ends.values()) + 1, high * len(schedule.orders) + 30
    boxes = []
    for rank, order in enumerate(schedule.orders):
        top = high * rank
        boxes.append(f'<text x="0" y="{top + 17}" fill="{QUIET}">rank {rank}</text>')
        for action in order:
            long = schedule.cost(action, costs) * unit
            x = left + ends[action] * unit - long
            shade = COLORS[action.kind][min(1, schedule.held(rank).index(action.stage))]
            boxes.append(
                f'<rect x="{x:g}" y="{top + 2}" width="{long - 1:g}" height="{high - 4}" fill="{shade}">'
                f"<title>{escape(_words(action))}</title></rect>"
                f'<text x="{x + long / 2 - 0.5:g}" y="{top + 17}" fill="white" text-anchor="middle">'
                f"{action.microbatch}</text>"
            )
    summary = f'<text x="{left}" y="{height - 8}" fill="{INK}">{escape(_summary(schedule, costs))}</text>'
    drawn = "\n".join([*boxes, summary])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" font-family="sans-serif" '
        f'font-size="12">\n{drawn}\n</svg>\n'
    )


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
