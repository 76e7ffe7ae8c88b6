"""Verification by the ranks of a world that torchrun made, on one machine or several.

Every rank runs the reference by itself, in its own process and without the others; then all run the sharded training,
and each gathers what all ranks took down. So every rank comes to the same verdict, and ends with the same exit code.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from sandbox.runtime import Member
from sandbox.verdict import Verdict
from sandbox.verify.verifier import Case, Verifier

__all__ = ["together"]

T = TypeVar("T")


def together(member: Member, cases: Sequence[Case], measure: bool = False) -> list[Verdict]:
    """The verdicts of `cases`, each of as many ranks as `member`'s world. The first rank sends them, too."""

    def world(size: int, work: Callable[..., T], *args: Any, timeout: float) -> list[T]:
        if size == 1:
            return [work(Member(), *args)]
        ranks: list[Any] = [None] * size
        dist.all_gather_object(ranks, work(member, *args))
        return ranks

    verifier = Verifier(world, measure=measure)
    verdicts = [verifier.verify(case) for case in cases]
    if member.rank == 0:
        member.send(verdicts)
    return verdicts
