"""Local pieces -> logical tensors -> how far they are from the reference.

Pieces are put together from what each rank held, by layout and without a collective: every element must be there, and
ranks that hold the same element must agree on it. (A gather by the strategy itself would hide just that.)
"""

import math
from collections.abc import Mapping, Sequence
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
    """Put the pieces of all ranks together, step by step; `ranks` holds each rank's steps.

    An element that no rank holds becomes NaN.
    """
    shapes = {name: layout.shape for steps in ranks for pieces in steps for name, layout in pieces.layouts.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    values = [torch.full((sum(sizes),), torch.nan, dtype=torch.float64) for _ in ranks[0]]  # all tensors end to end
    leasts, mosts = ([value.clone() for value in values] for _ in range(2))
    for steps in ranks:
        layouts: Mapping[str, Layout] | None = None
        for number, pieces in enumerate(steps):
            if pieces.layouts is not layouts:
                layouts, places = pieces.layouts, _places(pieces.layouts, shapes)
            one = torch.full_like(values[number], torch.nan).index_put_((places,), pieces.flat.double())
            values[number] = torch.where(values[number].isnan(), one, values[number])
            leasts[number], mosts[number] = torch.fmin(leasts[number], one), torch.fmax(mosts[number], one)
    wholes = []
    for value, least, most in zip(values, leasts, mosts, strict=True):
        parts = zip(shapes.items(), value.split(sizes), (most - least).nan_to_num_(0.0).split(sizes), strict=True)
        wholes.append(
            {
                name: Whole(part.view(shape), drift.max().item() if len(drift) else 0.0)
                for (name, shape), part, drift in parts
            }
        )
    return wholes


def _places(layouts: Mapping[str, Layout], shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Where the elements of a rank's pieces lie among those of all tensors, end to end."""
    ends = dict(zip(shapes, accumulate(map(math.prod, shapes.values())), strict=True))
    numbers = torch.arange(max(ends.values(), default=0))
    wholes = {name: numbers[ends[name] - math.prod(layout.shape) : ends[name]] for name, layout in layouts.items()}
    taken = [layout.take(wholes[name].view(layout.shape)).reshape(-1) for name, layout in layouts.items()]
    return torch.cat(taken) if taken else numbers


def differences(
    found: Mapping[str, Whole], reference: Mapping[str, Tensor], floors: Mapping[str, float]
) -> list[Difference]:
    """Every tensor's difference from the reference, worst first. A tensor that is absent differs infinitely."""
    result = []
    for name, ref in reference.items():
        whole = found.get(name, Whole(torch.full_like(ref, torch.nan), 0.0))
        largest, floor = ref.abs().max().item(), floors.get(name, 0.0)
        scale = max(largest, floor) or 1.0
        error = ((whole.value - ref).abs().max() / scale).item()
        dot, own, norm = (float((a * b).sum()) for a, b in ((whole.value, ref), (whole.value,) * 2, (ref, ref)))
        result.append(
            Difference(
                tensor=name,
                error=error if not math.isnan(error) else float("inf"),
                ratio=dot / norm if norm else float(own > 0),
                cos=dot / (own * norm) ** 0.5 if own and norm else float(own == norm),
                drift=whole.drift / scale,
                floored=floor > largest,
            )
        )
    extra = [Difference(tensor=n, error=float("inf"), ratio=0, cos=0) for n in found if n not in reference]
    return sorted([*result, *extra], key=lambda d: -max(d.error, d.drift))


def spread(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference between two runs, by tensor."""
    return {name: (value - other[name]).abs().max().item() for name, value in one.items()}
