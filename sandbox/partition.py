"""Cutting the parameters of a bucket over the ranks of an axis: one part a rank, of about a size.

ZeRO cuts the concatenation of all parameters into ranges, wherever they begin and end. FSDP cuts each parameter by
rows. Either way a rank holds one range of every flattened parameter, perhaps an empty one, and its part is those ranges
laid end to end. The parts in rank order are what reduce_scatter takes and all_gather returns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from sandbox.layout import Layout

__all__ = ["Partition", "by_ranges", "by_rows", "even", "own"]

Span = tuple[int, int]


@dataclass(frozen=True)
class Partition:
    """For every rank: parameter -> the elements [start, stop) of it, flattened, that the rank holds."""

    shapes: Mapping[str, torch.Size]
    spans: Sequence[Mapping[str, Span]]
    rows: bool  # spans are whole rows, and pieces keep the parameter's other dimensions

    @property
    def sizes(self) -> list[int]:
        """Elements of each rank's part."""
        return [sum(stop - start for start, stop in spans.values()) for spans in self.spans]

    @cached_property
    def lengths(self) -> dict[str, list[int]]:
        """Of each parameter, elements of the pieces into which `split` cuts it: they follow one another in it."""
        if not self.rows:
            return {name: [shape.numel()] for name, shape in self.shapes.items()}
        return {name: [spans[name][1] - spans[name][0] for spans in self.spans] for name in self.shapes}

    @cached_property
    def _cuts(self) -> list[int]:
        """Elements of all pieces, in the order in which they lie in all parts."""
        return [length for alike in zip(*self.lengths.values(), strict=True) for length in alike]

    def split(self, flat: Tensor) -> dict[str, list[Tensor]]:
        """Each parameter's pieces: views of `flat` [sum(sizes)], all parts laid end to end in rank order.

        Rows make a piece for each rank; ranges are in rank order what they are in the parameters, and stay one.
        """
        pieces, width = torch.split_with_sizes(flat, self._cuts), len(self.shapes)
        return {name: list(pieces[number::width]) for number, name in enumerate(self.shapes)}

    def homes(self, whole: Tensor) -> list[Tensor]:
        """Views of `whole`, the parameters flattened end to end: where the pieces of all parts in rank order belong."""
        pieces = whole.split([length for lengths in self.lengths.values() for length in lengths])
        each = len(pieces) // len(self.shapes)
        return [piece for number in range(each) for piece in pieces[number::each]]

    def unflatten(self, flat: Tensor, homes: list[Tensor]) -> None:
        """Copy all parts, in rank order in `flat` [sum(sizes)], to their `homes`."""
        torch.split_with_sizes_copy(flat, self._cuts, out=homes)

    def pieces(self, part: Tensor, rank: int) -> dict[str, Tensor]:
        """Views of `part` [sizes[rank]], the part of `rank`, by parameter."""
        sizes = [stop - start for start, stop in self.spans[rank].values()]
        names = self.spans[rank]
        return {
            name: view.view(self._shape(name, rank))
            for name, view in zip(names, torch.split_with_sizes(part, sizes), strict=True)
        }

    def layout(self, name: str, rank: int, whole: Layout, axes: tuple[str, ...]) -> Layout:
        """Where the piece of `rank` lies, given where the parameter itself does."""
        start, stop = self.spans[rank][name]
        if not self.rows:
            return whole.range(start, stop, axes)
        width = math.prod(self.shapes[name][1:])
        return whole.cut(0, start // width, stop // width, axes)

    def _shape(self, name: str, rank: int) -> tuple[int, ...]:
        start, stop = self.spans[rank][name]
        if not self.rows:
            return (stop - start,)
        return ((stop - start) // math.prod(self.shapes[name][1:]), *self.shapes[name][1:])


def by_ranges(params: Mapping[str, nn.Parameter], ranks: int) -> Partition:
    """Cut the concatenation of `params` into one range a rank."""
    bounds = [0, *accumulate(even(sum(p.numel() for p in params.values()), ranks))]
    spans: list[dict[str, Span]] = [{} for _ in range(ranks)]
    begin = 0
    for name, param in params.items():
        for mine, (low, high) in zip(spans, pairwise(bounds), strict=True):
            start, stop = max(low - begin, 0), min(high - begin, param.numel())
            mine[name] = (start, stop) if start < stop else (0, 0)
        begin += param.numel()
    return Partition({name: p.shape for name, p in params.items()}, spans, rows=False)


def by_rows(params: Mapping[str, nn.Parameter], ranks: int) -> Partition:
    """Cut every one of `params` along its first dimension."""
    spans: list[dict[str, Span]] = [{} for _ in range(ranks)]
    extra = 0  # who got the last odd row: the next odd row goes to the next rank, so that parts stay of a size
    for name, param in params.items():
        rows, width = param.shape[0], math.prod(param.shape[1:])
        sizes = even(rows, ranks)
        sizes = sizes[-extra:] + sizes[:-extra] if extra else sizes
        extra = (extra + rows) % ranks
        for mine, (low, high) in zip(spans, pairwise([0, *accumulate(sizes)]), strict=True):
            mine[name] = (low * width, high * width)
    return Partition({name: p.shape for name, p in params.items()}, spans, rows=True)


def even(total: int, parts: int) -> list[int]:
    """`total` in `parts` that differ by one at most, the larger ones first."""
    return [total // parts + (rank < total % parts) for rank in range(parts)]


def own(total: int, parts: int, number: int) -> range:
    """The part `number` of `total` in `parts` that differ by one at most, the larger ones first."""
    least, extra = divmod(total, parts)
    start = number * least + min(number, extra)
    return range(start, start + least + (number < extra))
