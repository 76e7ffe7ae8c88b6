"""What a rank of the doctor's tests runs: the self-test, with a collective that is wrong in one way."""

from typing import Any

import torch.distributed as dist

from sandbox.doctor import collectives
from sandbox.runtime import Member


def sum_for_average(member: Member) -> dict[str, str]:
    """As was reported of gloo."""
    right = dist.reduce_scatter_single
    dist.reduce_scatter_single = lambda *args, op: right(*args, op=dist.ReduceOp.SUM)
    return collectives.exercise(member)


def wrong_part(member: Member) -> dict[str, str]:
    """Rank 1 keeps what is rank 0's."""
    right = collectives.all_to_all

    def wrong(flat: Any, *args: Any) -> Any:
        return right(flat.roll(1) if member.rank == 1 else flat, *args)

    collectives.all_to_all = wrong
    return collectives.exercise(member)
