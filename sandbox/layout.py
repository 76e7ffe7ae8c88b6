"""Where a local tensor lies in its logical tensor. Said once by the strategy that cuts; all else follows from it.

Gathering gradients for parity, counting each element once in a norm, predicting memory, saving checkpoints: each asks
the layout and knows nothing of the strategy.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

__all__ = ["Layout", "local"]


@dataclass(frozen=True)
class Layout:
    """A box of a logical tensor, and perhaps a range of that box's elements in row-major order.

    Cuts compose: tensor parallelism takes a box, FSDP a smaller box of rows inside it, ZeRO a range of what is there.
    """

    shape: tuple[int, ...]  # of the logical tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]
    span: tuple[int, int] | None = None  # start, stop within the flattened box
    sharded: tuple[str, ...] = ()  # axes over which ranks hold different pieces; over all others, the same one
    copy: int = 0  # if several ranks along `sharded` hold this piece all the same: which of them this one is

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Self:
        """All of a tensor, on every rank."""
        return cls(shape, (0,) * len(shape), shape)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor."""
        return self.size if self.span is None else (self.span[1] - self.span[0],)

    @property
    def numel(self) -> int:
        """Elements of the local tensor."""
        return math.prod(self.local_shape)

    def cut(self, dim: int, start: int, stop: int, axes: tuple[str, ...]) -> Self:
        """Keep [start, stop) of dimension `dim` of this box."""
        if self.span is not None:
            raise ValueError("a range of a flattened box has no dimensions left to cut")
        offset, size = list(self.offset), list(self.size)
        offset[dim] += start
        size[dim] = stop - start
        return replace(self, offset=tuple(offset), size=tuple(size), sharded=(*self.sharded, *axes))

    def range(self, start: int, stop: int, axes: tuple[str, ...]) -> Self:
        """Keep the elements [start, stop) of this box, flattened."""
        base = self.span[0] if self.span else 0
        return replace(self, span=(base + start, base + stop), sharded=(*self.sharded, *axes))

    def take(self, full: Tensor) -> Tensor:
        """Cut this piece out of the logical tensor (a view where it can be one)."""
        box = full[_slices(self.offset, self.size)]
        return box if self.span is None else box.reshape(-1)[slice(*self.span)]

    def put(self, full: Tensor, local: Tensor) -> None:
        """Write this piece to its place in the logical tensor."""
        flat, at = local.reshape(-1), 0
        for offset, size in self.boxes():
            end = at + math.prod(size)
            full[_slices(offset, size)] = flat[at:end].view(size)
            at = end

    def boxes(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The piece as boxes of the logical tensor, (offset, size), that follow one another in the local tensor.

        One, or of a range in a matrix up to three: the end of a row, whole rows, the beginning of a row.
        """
        for offset, size in _boxes(self.size, *(self.span or (0, math.prod(self.size)))):
            yield tuple(map(sum, zip(self.offset, offset, strict=True))), size


def _slices(offset: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))


def _boxes(size: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements [start, stop) of a flattened box, as boxes in it, in row-major order."""
    if start >= stop:
        return
    if stop - start == math.prod(size):
        yield (0,) * len(size), size
        return
    width = math.prod(size[1:])
    first, last = -(-start // width), stop // width
    row = start // width
    if start % width:
        for offset, part in _boxes(size[1:], start % width, min(stop - row * width, width)):
            yield (row, *offset), (1, *part)
    if first < last:
        yield (first, *(0 for _ in size[1:])), (last - first, *size[1:])
    if last >= first and stop % width:
        for offset, part in _boxes(size[1:], 0, stop % width):
            yield (last, *offset), (1, *part)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank: the tensor itself, unless it is one of torch's DTensors."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local else tensor
