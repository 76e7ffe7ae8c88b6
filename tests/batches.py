"""Batches made by hand, from the lengths of their documents."""

from collections.abc import Sequence

import torch

from sandbox.batch import IGNORED, Batch

__all__ = ["make"]


def make(*rows: Sequence[int], key: int = 5) -> Batch:
    """A batch of rows, each given by the lengths of its documents; what remains of the longest row is padding."""
    size = max(map(sum, rows))
    positions, documents = torch.zeros(len(rows), size).long(), torch.full((len(rows), size), -1)
    for row, lengths in enumerate(rows):
        at = 0
        for document, length in enumerate(lengths):
            positions[row, at : at + length] = torch.arange(length)
            documents[row, at : at + length] = document
            at += length
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(11, (len(rows), size), generator=draw)
    targets = torch.randint(11, (len(rows), size), generator=draw).masked_fill(documents < 0, IGNORED)
    return Batch(tokens, targets, positions, documents, torch.arange(len(rows)), torch.arange(size), key)
