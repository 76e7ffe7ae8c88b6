"""Text to tokens to global batches, each a pure function of (seed, step).

Bytes are tokens 0 to 255; 256 ends a document. The text is cut once: its last part is kept for validation, as is the
custom with enwik8. A cut at one place leaks nothing: no window crosses it, and no target lies beyond it. (It is also
the best cut of the default corpus, whose chapters quote one another: elsewhere up to 65 % of a tenth stands, in pieces
of 64 bytes, in the rest as well; of the last tenth 9 % does.)

Each part is cut into windows that do not overlap. An epoch is a permutation of the training windows, and steps follow
one another through the epochs without a gap, so every window is seen exactly once an epoch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Self

import numpy as np
import torch
from torch import Tensor

from sandbox.batch import IGNORED, Batch
from sandbox.config import Data
from sandbox.errors import ConfigError

__all__ = ["END", "VOCAB", "Corpus", "bits_per_byte"]

END = 256
"""Token that ends a document, and fills what padding leaves over."""

VOCAB = 257
"""Tokens there are: the bytes and END."""


@dataclass(frozen=True)
class Part:
    """A stretch of the text, N tokens of C documents, cut into W windows."""

    tokens: Tensor  # [N] int16: all ranks load the text, and most never look at most of it
    ends: Tensor  # [C] int64, each document's last token, ascending
    starts: Tensor  # [W] int64, a window's first token
    lengths: Tensor  # [W] int64, at most the sequence length

    @classmethod
    def cut(cls, tokens: Tensor, ends: Tensor, data: Data) -> Self:
        """The windows of a stretch, by `data.layout`. What is left over at the end of a packed stretch is dropped."""
        size = data.sequence
        if data.layout == "packed":
            starts = torch.arange(len(tokens) // size) * size
            return cls(tokens, ends, starts, torch.full_like(starts, size))
        begins = torch.cat((ends.new_zeros(1), ends[:-1] + 1))
        # A document's last token has no target, so no window begins there.
        starts = torch.cat([torch.arange(a, b, size) for a, b in zip(begins.tolist(), ends.tolist(), strict=True)])
        beyond = ends[torch.searchsorted(ends, starts)] + 1
        return cls(tokens, ends, starts, (beyond - starts).clamp(max=size))

    def rows(self, windows: Tensor, size: int, key: int) -> Batch:
        """A batch of the given windows [B], each in a row of `size` columns."""
        column = torch.arange(size)
        inside = column < self.lengths[windows, None]
        index = torch.where(inside, self.starts[windows, None] + column, self.starts[windows, None])
        document = torch.searchsorted(self.ends, index)  # the first that does not end before the token
        has_next = inside & (index < self.ends[document])
        documents = torch.where(inside, document - document[:, :1], -1)
        begins = documents.diff(dim=1, prepend=documents[:, :1]) != 0
        return Batch(
            tokens=torch.where(inside, self.tokens[index].long(), END),
            targets=torch.where(has_next, self.tokens[index + has_next].long(), IGNORED),
            positions=column - torch.where(begins, column, 0).cummax(dim=1).values,
            documents=documents,
            rows=torch.arange(len(windows)),
            columns=column,
            key=key,
        )


@dataclass(frozen=True)
class Corpus:
    """A text, cut into windows for training and for validation."""

    data: Data
    documents: int
    train: Part
    held_out: Part

    @classmethod
    def load(cls, data: Data, vocab: int = VOCAB) -> Self:
        """Read the text of `data` for a model of `vocab` tokens.

        Raises ConfigError: a file cannot be read or is empty, a part is shorter than a window, or too small a `vocab`.
        """
        if vocab < VOCAB:
            raise ConfigError(
                f"model.vocab {vocab} cannot hold the 256 bytes and the end of a document. Set model.vocab: {VOCAB}."
            )
        tokens, ends = _tokenised([_read(path) for path in data.files]) if data.files else _TOPICS
        place = len(tokens) - max(1, round(data.held_out * len(tokens)))
        train = _part(tokens[:place], ends, data, "training", "lower data.held_out")
        held_out = _part(tokens[place:], ends - place, data, "validation", "raise data.held_out")
        return cls(data, len(ends), train, held_out)

    def batch(self, step: int, *, seed: int, rows: int) -> Batch:
        """The global batch of `step`, with `rows` rows: a pure function of (seed, step)."""
        windows = len(self.train.starts)
        first = step * rows
        epochs = range(first // windows, (first + rows - 1) // windows + 1)
        order = np.concatenate([_order(seed, epoch, windows) for epoch in epochs])
        skip = first - epochs.start * windows
        chosen = torch.from_numpy(order[skip : skip + rows])
        batch = self.train.rows(chosen, self.data.sequence, key=int(_random("key", seed, step).integers(2**63)))
        return _ragged(batch, seed, step) if self.data.mask == "ragged" else batch

    def held_out_batches(self, count: int, *, rows: int) -> list[Batch]:
        """The same `count` batches each time, of windows spread evenly over the part kept for validation."""
        windows = len(self.held_out.starts)
        chosen = torch.arange(count * rows) * windows // (count * rows)
        return [self.held_out.rows(part, self.data.sequence, key=0) for part in chosen.view(count, rows)]

    @cached_property
    def unigram_entropy(self) -> float:
        """Nats per training token that knowing the tokens' frequencies alone leaves: a model must get below it."""
        counts = torch.bincount(self.train.tokens).double()
        return float(torch.special.entr(counts / counts.sum()).sum())

    def __str__(self) -> str:
        """One line for people."""
        name = ", ".join(path.name for path in self.data.files) or "pydoc_data.topics"
        return (
            f"{name}: {self.documents:,} documents; {len(self.train.tokens):,} tokens for training, in "
            f"{len(self.train.starts):,} windows of {self.data.sequence}, and {len(self.held_out.tokens):,} for "
            f"validation; unigram entropy {self.unigram_entropy:.3f} nats"
        )


def bits_per_byte(loss: float) -> float:
    """What a mean loss in nats per token is in bits; a token is a byte, but for the one that ends a document."""
    return loss / math.log(2)


def _part(tokens: Tensor, ends: Tensor, data: Data, purpose: str, fix: str) -> Part:
    """A stretch of a text whose documents end at `ends`, counted from its first token. A cut ends a document too."""
    inside = ends[(ends >= 0) & (ends < len(tokens) - 1)]
    part = Part.cut(tokens, torch.cat((inside, inside.new_tensor([len(tokens) - 1]))), data) if len(tokens) else None
    if part is None or not len(part.starts):
        raise ConfigError(
            f"data.sequence {data.sequence} is longer than the {len(tokens)} tokens for {purpose}. "
            f"Lower data.sequence, {fix}, or add text to data.files."
        )
    return part


@lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def _order(seed: int, epoch: int, windows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The windows in the order in which an epoch sees them."""
    return _random("order", seed, epoch).permutation(windows)


def _ragged(batch: Batch, seed: int, step: int) -> Batch:
    """Hide each row's targets at its own rate, and the first quarter of the rows whole (but never the only row)."""
    random = _random("ragged", seed, step)
    rows, columns = batch.targets.shape
    rate = random.uniform(0, 0.9, (rows, 1))
    rate[: min(max(1, rows // 4), rows - 1)] = 1
    hidden = torch.from_numpy(random.random((rows, columns)) < rate)
    return replace(batch, targets=batch.targets.masked_fill(hidden, IGNORED))


def _random(purpose: str, *numbers: int) -> np.random.Generator:
    """A generator for one purpose and place; NumPy's seeding is the same in every process and on every machine."""
    return np.random.default_rng([*purpose.encode(), *numbers])


def _read(path: Path) -> bytes:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"data.files: {path} cannot be read ({error.strerror}). Correct the path or drop it."
        ) from None
    if not text:
        raise ConfigError(f"data.files: {path} is empty. Drop it or fill it.")
    return text


def _tokenised(texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """All tokens [N] of the documents, and where each of those ends [C]."""
    ended = [np.append(np.frombuffer(text, np.uint8), np.int16(END)) for text in texts]
    return torch.from_numpy(np.concatenate(ended)), torch.tensor([len(document) for document in ended]).cumsum(0) - 1


_TOPICS = _tokenised([topics[name].encode() for name in sorted(topics)])
"""CPython's own documentation, one chapter a document. Ranks are forked from who has it already."""
