"""A self-test of the collectives that strategies and engines are made of, in ranks of this machine.

Each is held against its definition in float64, on parts of unequal size where it takes them. The averages are those of
torch's own reduce-scatter, which FSDP2 relies on; on gloo it has been reported to sum instead (pytorch #162338).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from sandbox.comm import Axis, all_gather, all_reduce, all_to_all, pass_on, reduce_scatter
from sandbox.runtime import Member

__all__ = ["exercise"]


def exercise(member: Member) -> dict[str, str]:
    """Collective -> what it did wrong on this rank, or nothing."""
    torch.manual_seed(0)
    device, ranks = torch.device(member.device), member.world
    axis = Axis(("world",), ranks, member.rank, dist.group.WORLD)
    sizes = list(range(1, ranks + 1))
    whole = torch.randn(ranks, sum(sizes), dtype=torch.float64).to(device)  # row r is what rank r has
    even = torch.randn(ranks, ranks, 5, dtype=torch.float64).to(device)
    mine, rank = whole[member.rank], member.rank
    parts = [row.split(sizes) for row in whole]

    def average() -> Tensor:
        out = torch.empty_like(even[0, 0])
        dist.reduce_scatter_single(out, even[rank].flatten(), op=dist.ReduceOp.AVG)
        return out

    def batched() -> Tensor:
        landing = torch.empty_like(mine)
        sending = dist.P2POp(dist.isend, mine, (rank + 1) % ranks)
        for work in dist.batch_isend_irecv([sending, dist.P2POp(dist.irecv, landing, (rank - 1) % ranks)]):
            work.wait()
        return landing

    def gathered() -> Tensor:
        flat = torch.zeros_like(mine)
        flat.split(sizes)[rank].copy_(parts[rank][rank])
        return all_gather(flat, sizes, axis).wait()

    def exchanged() -> Tensor:
        landing = mine.new_empty(sizes[rank] * ranks)
        return all_to_all(mine, sizes, landing, [sizes[rank]] * ranks, axis).wait()

    tests: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "all-reduce": (lambda: all_reduce(mine.clone(), axis).wait(), whole.sum(0)),
        "reduce-scatter, sum": (
            lambda: reduce_scatter(mine, sizes, axis, mine.dtype).wait(),
            whole.sum(0).split(sizes)[rank],
        ),
        "reduce-scatter, average": (average, even[:, rank].mean(0)),
        "all-gather": (gathered, torch.cat([parts[r][r] for r in range(ranks)])),
        "all-to-all": (exchanged, torch.cat([parts[r][rank] for r in range(ranks)])),
        "send and receive": (lambda: pass_on(mine, torch.empty_like(mine), axis).wait(), whole[rank - 1]),
        "batched send and receive": (batched, whole[rank - 1]),
    }
    return {name: _held(run, expected) for name, (run, expected) in tests.items()}


def _held(run: Callable[[], Tensor], expected: Tensor) -> str:
    error = (run() - expected).abs().max().item()
    return "" if error <= 1e-12 else f"is off by {error:.1e}"
