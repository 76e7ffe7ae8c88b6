"""Which rank holds what of every tensor, and how much that is: the model drawn part by part."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sandbox.report.svg import Drawing
from sandbox.report.words import size

__all__ = ["Box", "Drawn", "Held", "boxes", "held", "tensors"]

Box = tuple[float, float, float, float]
"""Left, top, right, bottom of a part of a tensor, in parts of its width and height."""

COLUMN, LABEL, GAP, LEAST = 88, 150, 9, 7
LARGEST = 60
"""Pixels of the largest dimension of any tensor; the others in proportion, but at least LEAST."""
BLOCKS = 6
"""Blocks drawn; those left out look alike."""


@dataclass(frozen=True)
class Drawn:
    """A tensor, and the parts of it that ranks hold."""

    shape: tuple[int, ...]
    parts: Mapping[tuple[int, ...], Sequence[Box]]  # by ranks that hold just these


@dataclass(frozen=True)
class Held:
    """Bytes of one kind, by rank, and those of the model unsharded."""

    kind: str
    ranks: Sequence[int]
    whole: int


def boxes(
    shape: Sequence[int], offset: Sequence[int], extent: Sequence[int], span: tuple[int, int] | None = None
) -> list[Box]:
    """A box of a tensor, or the elements `span` of that box in row-major order, as rectangles. Vectors lie flat."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
    top, left = (offset[0], offset[1] * (columns // shape[1])) if len(shape) > 1 else (0, offset[0])
    high, wide = (extent[0], extent[1] * (columns // shape[1])) if len(shape) > 1 else (1, extent[0])
    start, stop = span or (0, high * wide)
    if stop <= start:
        return []
    (first, begin), (last, end) = divmod(start, wide), divmod(stop - 1, wide)
    lines = [(first, last + 1, begin, end + 1)]
    if first < last:
        lines = [(first, first + 1, begin, wide), (first + 1, last, 0, wide), (last, last + 1, 0, end + 1)]
    return [
        ((left + begin) / columns, (top + row) / rows, (left + end) / columns, (top + until) / rows)
        for row, until, begin, end in _joined([line for line in lines if line[1] > line[0]])
    ]


def tensors(model: Mapping[str, Drawn], world: int) -> Drawing:
    """Every tensor of the model: embedding, block after block, final norm and head; coloured by who holds what."""
    drawing = Drawing()
    numbers = list(dict.fromkeys(name.split(".")[1] for name in model if name.startswith("blocks.")))
    blocks = {f"block {number}": f"blocks.{number}." for number in numbers[:BLOCKS]}
    rows = list(dict.fromkeys(name.split(".", 2)[2] for name in model if name.startswith("blocks.")))
    scale = LARGEST / max(max(drawn.shape) for drawn in model.values())
    heights = [_extent(next(d for n, d in model.items() if n.endswith("." + row)).shape, scale)[1] for row in rows]
    for row, (name, height) in enumerate(zip(rows, heights, strict=True)):
        top = 24 + sum(heights[:row]) + GAP * row
        drawing.text(0, top + height / 2 + 4, name, "quiet small")
        for column, prefix in enumerate(blocks.values(), 1):
            if prefix + name in model:
                _tensor(drawing, LABEL + COLUMN * column, top, prefix + name, model[prefix + name], scale, world)
    for column, label in enumerate(("embedding", *blocks, "norm, head")):
        drawing.text(LABEL + COLUMN * column, 10, label, "small")
    for left, mine in (
        (LABEL, [n for n in model if n.startswith("embed")]),
        (LABEL + COLUMN * (len(blocks) + 1), [n for n in model if n.startswith(("norm", "head"))]),
    ):
        top = 24.0
        for name in mine:
            top += _tensor(drawing, left, top, name, model[name], scale, world) + GAP
    if len(numbers) > BLOCKS:
        drawing.text(0, drawing.height + 12, f"and {len(numbers) - BLOCKS} blocks more", "quiet small")
    return drawing


def held(kinds: Sequence[Held], places: Sequence[str]) -> Drawing:
    """Bars of what each rank holds, within the outline of what the unsharded model holds."""
    drawing = Drawing()
    wide, left = 150, LABEL
    for column, kind in enumerate(kinds):
        x = left + column * (wide + 90)
        drawing.text(x, 10, kind.kind, "small")
        for rank, count in enumerate(kind.ranks):
            y = 20 + 16 * rank
            drawing.rect(x, y, wide, 10, "track")
            share = min(1.0, count / kind.whole) if kind.whole else 0
            drawing.rect(x, y, wide * share, 10, drawing.held([rank], 0), f"{kind.kind}: {size(count)}")
            drawing.text(x + wide + 8, y + 9, size(count), "quiet small")
    for rank, place in enumerate(places):
        drawing.text(0, 29 + 16 * rank, f"rank {rank}" + (f": {place}" if place else ""), "quiet small")
    return drawing


def _tensor(drawing: Drawing, left: float, top: float, name: str, drawn: Drawn, scale: float, world: int) -> float:
    wide, high = _extent(drawn.shape, scale)
    whole = " x ".join(map(str, drawn.shape))
    for ranks, parts in drawn.parts.items():
        who = "all ranks" if len(ranks) == world > 1 else f"rank {', '.join(map(str, ranks))}"
        for x0, y0, x1, y1 in parts:
            gap = 0.5 if (x0, y0, x1, y1) != (0, 0, 1, 1) else 0
            drawing.rect(
                left + x0 * wide + gap / 2,
                top + y0 * high + gap / 2,
                max((x1 - x0) * wide - gap, 0.5),
                max((y1 - y0) * high - gap, 0.5),
                drawing.held(ranks, world if world > 1 else 0),
                f"{name} [{whole}]: {who}",
            )
    return high


def _extent(shape: Sequence[int], scale: float) -> tuple[float, float]:
    """Width and height in pixels: rows downwards, vectors flat."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
    return max(LEAST, columns * scale), LEAST if rows == 1 else max(LEAST, rows * scale)


def _joined(cuts: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Rows that follow one another and begin and end alike are one rectangle."""
    joined: list[tuple[int, int, int, int]] = []
    for row, until, begin, end in cuts:
        if joined and joined[-1][1] == row and joined[-1][2:] == (begin, end):
            joined[-1] = (joined[-1][0], until, begin, end)
        else:
            joined.append((row, until, begin, end))
    return joined
