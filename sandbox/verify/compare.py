"""Local pieces -> logical tensors -> how far they are from the reference.

Pieces are put together from what each rank held, by layout and without a collective: every element must be there, and
ranks that hold the same element must agree on it. (A gather by the strategy itself would hide just that.)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sandbox.layout import Layout
from sandbox.verdict import Difference
from sandbox.verify.capture import Pieces

__all__ = ["Whole", "assemble", "differences", "spread"]


@dataclass(frozen=True)
class Whole:
    """A logical tensor in float64, and the largest difference between ranks that hold the same element of it."""

    value: Tensor
    drift: float


def assemble(ranks: Sequence[Sequence[Pieces]]) -> list[dict[str, Whole]]:
    """Put the pieces of all ranks together, step by step; `ranks` holds each rank's steps, all of the same layouts.

    An element that no rank holds becomes NaN.
    """
    shapes = {name: layout.shape for first, *_ in ranks for name, layout in first.layouts.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    value = torch.full((len(ranks[0]), sum(sizes)), torch.nan, dtype=torch.float64)  # a step a row, tensors end to end
    least, most = torch.full_like(value, math.inf), torch.full_like(value, -math.inf)
    for steps in reversed(ranks):  # what several hold is the first one's
        places = _places(steps[0].layouts, shapes)
        held = torch.stack([pieces.flat.double() for pieces in steps])
        value[:, places] = held
        least[:, places] = torch.minimum(least[:, places], held)
        most[:, places] = torch.maximum(most[:, places], held)
    drift = (most - least).nan_to_num_(nan=math.inf, posinf=math.inf, neginf=0.0)
    return [
        {
            name: Whole(part.view(shape), furthest)
            for (name, shape), part, furthest in zip(shapes.items(), row.split(sizes), _furthest(d, sizes), strict=True)
        }
        for row, d in zip(value, drift, strict=True)
    ]


def _places(layouts: Mapping[str, Layout], shapes: Mapping[str, tuple[int, ...]]) -> Tensor | slice:
    """Where the elements of a rank's pieces lie among those of all tensors, end to end."""
    if [*layouts] == [*shapes] and all(layout.numel == math.prod(layout.shape) for layout in layouts.values()):
        return slice(None)
    ends = dict(zip(shapes, accumulate(map(math.prod, shapes.values())), strict=True))
    numbers = torch.arange(max(ends.values(), default=0))
    wholes = {name: numbers[ends[name] - math.prod(layout.shape) : ends[name]] for name, layout in layouts.items()}
    return torch.cat([layout.take(wholes[n].view(layout.shape)).reshape(-1) for n, layout in layouts.items()])


def _furthest(drift: Tensor, sizes: list[int]) -> list[float]:
    if not drift.any():
        return [0.0] * len(sizes)
    return [part.max().item() if len(part) else 0.0 for part in drift.split(sizes)]


def differences(
    found: Mapping[str, Whole], reference: Mapping[str, Tensor], floors: Mapping[str, float]
) -> list[Difference]:
    """Every tensor's difference from the reference, worst first. A tensor that is absent differs infinitely."""
    extra = [Difference(tensor=n, error=math.inf, ratio=0, cos=0) for n in found if n not in reference]
    known = list(_each(found, reference, floors)) if reference else []
    return sorted([*known, *extra], key=lambda d: -max(d.error, d.drift))


def _each(
    found: Mapping[str, Whole], reference: Mapping[str, Tensor], floors: Mapping[str, float]
) -> Iterator[Difference]:
    refs = list(reference.values())
    wholes = [found.get(name) or Whole(torch.full_like(ref, torch.nan), 0.0) for name, ref in reference.items()]
    values = [whole.value for whole in wholes]
    gaps, sizes = (_numbers(torch._foreach_norm(x, math.inf)) for x in (torch._foreach_sub(values, refs), refs))
    own, norms = (_numbers(torch._foreach_norm(x)) for x in (values, refs))
    dots = _numbers([product.sum() for product in torch._foreach_mul(values, refs)])
    for name, whole, gap, size, mine, norm, dot in zip(reference, wholes, gaps, sizes, own, norms, dots, strict=True):
        floor = floors.get(name, 0.0)
        scale = max(size, floor) or 1.0
        yield Difference(
            tensor=name,
            error=gap / scale if not math.isnan(gap) else math.inf,
            ratio=dot / norm**2 if norm else float(mine > 0),
            cos=dot / (mine * norm) if mine and norm else float(mine == norm),
            drift=whole.drift / scale,
            floored=floor > size,
        )


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    return [float(number) for number in torch.stack(list(scalars)).tolist()]


def spread(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference between two runs, by tensor."""
    return {name: (value - other[name]).abs().max().item() for name, value in one.items()}
