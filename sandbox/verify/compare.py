"""Local pieces -> logical tensors -> how far they are from the reference.

Pieces are put together from what each rank held, by layout and without a collective: every element must be there, and
ranks that hold the same element must agree on it. (A gather by the strategy itself would hide just that.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sandbox.verdict import Difference
from sandbox.verify.capture import Pieces

__all__ = ["Whole", "assemble", "differences", "spread"]


@dataclass(frozen=True)
class Whole:
    """A logical tensor in float64, and the largest difference between ranks that hold the same element of it."""

    value: Tensor
    drift: float


def assemble(ranks: Sequence[Pieces]) -> dict[str, Whole]:
    """Put the pieces of all ranks together, by logical name. An element that no rank holds becomes NaN."""
    shapes = {name: piece.layout.shape for pieces in ranks for name, piece in pieces.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    value = torch.full((sum(sizes),), torch.nan, dtype=torch.float64)  # all tensors end to end
    least, most = value.clone(), value.clone()
    for pieces in ranks:
        one = torch.full_like(value, torch.nan)
        for (name, shape), part in zip(shapes.items(), one.split(sizes), strict=True):
            if name in pieces:
                pieces[name].layout.put(part.view(shape), pieces[name].local)
        value = torch.where(value.isnan(), one, value)
        least, most = torch.fmin(least, one), torch.fmax(most, one)
    drifts = (most - least).nan_to_num_(0.0).split(sizes)
    return {
        name: Whole(part.view(shape), drift.max().item() if drift.numel() else 0.0)
        for (name, shape), part, drift in zip(shapes.items(), value.split(sizes), drifts, strict=True)
    }


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
