"""Which rows of the batch each rank saw, and how it weighted them."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from sandbox.config import Config
from sandbox.verify.capture import Capture
from sandbox.verify.reference import RowLoss

__all__ = ["misdealt", "misweighted"]


def misdealt(ranks: Sequence[Capture], reference: Capture) -> str:
    """What is wrong with the rows that ranks saw, in words: each is for one data rank, with all of its tokens.

    Ranks along cp share a row's columns; ranks along pp and tp see what their neighbours see.
    """
    for step, expected in enumerate(reference.tokens):
        wanted = dict(expected)
        for stage in sorted({(rank.place["pp"], rank.place["tp"]) for rank in ranks}):
            seen: dict[int, int] = defaultdict(int)
            owners: dict[int, set[tuple[int, ...]]] = defaultdict(set)
            for rank in (rank for rank in ranks if (rank.place["pp"], rank.place["tp"]) == stage):
                for row, checksum in rank.tokens[step]:
                    seen[row] += checksum
                    owners[row].add(tuple(rank.place[axis] for axis in ("dp_replicate", "dp_shard", "ep")))
            twice = sorted(row for row, who in owners.items() if len(who) > 1)
            never = sorted(set(wanted) - set(seen))
            if twice or never or set(seen) - set(wanted):
                parts = [f"rows {_list(twice)} were seen more than once"] if twice else []
                parts += [f"rows {_list(never)} were never seen"] if never else []
                return f"in step {step + 1}, {' and '.join(parts) or 'other rows were seen'}."
            other = sorted(row for row, checksum in seen.items() if (checksum - wanted[row]) % 2**64)
            if other:
                return f"in step {step + 1}, rows {_list(other)} hold other tokens than the reference's."
    return ""


def misweighted(ranks: Sequence[Capture], rows: Sequence[RowLoss], config: Config) -> str:
    """Which wrong weighting of rows, if any, explains each rank's share of the first step's loss."""
    if config.mesh.world != config.mesh.dp.degree:
        return ""  # ranks that share rows do not have losses of their own
    parts = [
        [[rows[row] for row in part] for part in _split([row for row, _ in rank.tokens[0]], config.train.microbatches)]
        for rank in ranks
    ]
    seen, valid = len(ranks), max(1, sum(count for _, count in rows))

    def mean(part: Sequence[RowLoss]) -> float:
        return sum(loss for loss, _ in part) / max(1, sum(count for _, count in part))

    wrong: dict[str, list[float]] = {
        "each microbatch's loss is its own mean, and the mean of those is taken": [
            sum(mean(part) for part in mine) / len(mine) / seen for mine in parts
        ],
        "each rank's loss is its own mean, and the mean of those is taken": [
            mean([row for part in mine for row in part]) / seen for mine in parts
        ],
        "the last microbatch is missing": [
            sum(loss for part in mine[:-1] for loss, _ in part) / valid for mine in parts
        ],
    }
    for text, shares in wrong.items():
        if all(abs(rank.losses[0] - share) <= 1e-4 * abs(share) for rank, share in zip(ranks, shares, strict=True)):
            return text
    return ""


def _split(rows: Sequence[int], parts: int) -> list[list[int]]:
    return [part.tolist() for part in torch.tensor(rows).tensor_split(parts)]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")
