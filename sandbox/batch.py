"""The tokens of one step, and the three ways to cut them: rows, columns, microbatches."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Concatenate, ParamSpec, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

__all__ = ["IGNORED", "Batch", "once_per_batch"]

P = ParamSpec("P")
T = TypeVar("T")

IGNORED = -100
"""Target of a position that does not count in the loss, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows and columns of a global batch. What a rank sees is again a Batch.

    Positions and documents are explicit, so that a cut in any order (contiguous, zigzag) needs nothing else;
    rows and columns tell a token's place in the GLOBAL batch, for dropout masks that do not depend on the layout.
    """

    tokens: Tensor  # [B, S] int64
    targets: Tensor  # [B, S] int64, IGNORED where nothing is to be predicted
    positions: Tensor  # [B, S] int64, place within the token's document
    documents: Tensor  # [B, S] int64, document within the row; -1 on padding
    rows: Tensor  # [B] int64, place of each row in the global batch
    columns: Tensor  # [S] int64, place of each column in the full sequence
    key: int  # of (seed, step): what dropout masks are drawn from

    @property
    def valid(self) -> int:
        """Number of positions that count in the loss."""
        return int((self.targets != IGNORED).sum())

    def take_rows(self, index: Tensor | slice) -> Self:
        """The given rows of the batch."""
        return replace(self._grids(lambda t: t[index]), rows=self.rows[index])

    def take_columns(self, index: Tensor | slice) -> Self:
        """The given columns of the batch."""
        return replace(self._grids(lambda t: t[:, index]), columns=self.columns[index])

    def split_rows(self, parts: int) -> list[Self]:
        """Cut into `parts` of consecutive rows; sizes differ by one at most, larger ones first."""
        return [self.take_rows(index) for index in torch.arange(len(self.rows)).tensor_split(parts)]

    def filled(self, rows: int) -> Self:
        """The batch with its last row repeated up to `rows` rows, without targets."""
        if (count := len(self.rows)) == rows:
            return self
        padded = self.take_rows(torch.arange(rows).clamp(max=count - 1))
        targets = padded.targets.clone()
        targets[count:] = IGNORED
        return replace(padded, targets=targets)

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`."""
        moved = self._grids(lambda t: t.to(device))
        return replace(moved, rows=self.rows.to(device), columns=self.columns.to(device))

    def _grids(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            tokens=change(self.tokens),
            targets=change(self.targets),
            positions=change(self.positions),
            documents=change(self.documents),
        )


def once_per_batch(function: Callable[Concatenate[Batch, P], T]) -> Callable[Concatenate[Batch, P], T]:
    """Remember the results for a batch while it lives: what all layers share is worked out by the first."""
    memory: WeakKeyDictionary[Batch, dict[Hashable, T]] = WeakKeyDictionary()

    @wraps(function)
    def remembered(batch: Batch, /, *args: P.args, **kwargs: P.kwargs) -> T:
        results = memory.setdefault(batch, {})
        key = (args, *kwargs.items())
        if key not in results:
            results[key] = function(batch, *args, **kwargs)
        return results[key]

    return remembered
