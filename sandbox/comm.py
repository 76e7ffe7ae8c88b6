"""The collectives, each at the least bytes that it can send.

    collective        result on a rank                     bytes sent by a rank of n (P: bytes of the whole)
    all_reduce        the sum, everywhere                  2 (n-1)/n P
    reduce_scatter    the sum of its own part              P - own part
    all_gather        all parts                            (n-1) own part
    all_to_all        its part of every rank's whole       P - own part
    send (pass_on)    what the previous rank held          P
    send, receive     what one rank sent to another        P, and nothing

On gloo, reduce_scatter and all_gather are direct exchanges: every rank sends each other rank just what that rank needs,
from where it lies to where it belongs. gloo's own reduce_scatter is an all_reduce and a slice (twice the bytes) and its
all_gather copies once more; both want parts of one size. Here parts may differ in size, so nothing is padded.
Two ranks all_reduce little by exchanging the whole: the same bytes as a ring, in one hop instead of two.
On NCCL its own collectives are used. Sums are taken in rank order on gloo, so results repeat to the bit.

Lower bounds: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from sandbox.recorder import Event, Recorder

__all__ = [
    "Axis",
    "Pending",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "own_part",
    "pass_on",
    "receive",
    "reduce_scatter",
    "ring_bytes",
    "send",
]

FIRST_TAG = 16
"""Tags below are for the collectives made of messages, each its own."""

SMALL = 2**20
"""Bytes up to which one hop beats a ring of two ranks, although it adds twice as much."""


@dataclass(frozen=True)
class Axis:
    """A rank's place along one axis of the mesh, or along several taken as one. `group` is None on paper."""

    names: tuple[str, ...]
    size: int
    rank: int
    group: dist.ProcessGroup | None = None
    recorder: Recorder = field(default_factory=Recorder)

    @property
    def name(self) -> str:
        """For people: `dp_shard`, or `dp_replicate x dp_shard`."""
        return " x ".join(self.names)

    @cached_property
    def members(self) -> int:
        """The ranks of the world that are in the group, a bit each; the first 256."""
        ranks = dist.get_process_group_ranks(self.group) if self.group else ()
        return sum(1 << rank for rank in ranks) & (2**256 - 1)

    def begin(self, op: str, sent: float, tensor: Tensor, *, alike: bool = True) -> Event:
        """A collective of `tensor` starts, on all ranks of the axis; `alike`: the tensors are of one shape."""
        event = self.recorder.launch(op, self.name, sent, tensor)
        if self.recorder.board and self.group is not None:
            self.recorder.board.start(self.members, op, self.name, event.shape if alike else "")
        return event


_watchers = ThreadPoolExecutor(64, "watcher")  # of a detailed recorder's collectives; starts no thread before the first


class Pending:
    """A collective under way. `wait` returns its result; `finish` is what is left to do when the bytes have come."""

    def __init__(self, axis: Axis, event: Event, works: Sequence[dist.Work], finish: Callable[[], Tensor]) -> None:
        self._axis, self._event, self._works, self._finish = axis, event, works, finish
        # gloo tells of the end of a send or receive only to whoever waits for it: for a timeline, somebody must at once
        self._landed = _watchers.submit(self._land) if axis.recorder.detailed and works else None

    def _land(self) -> None:
        for work in self._works:
            work.wait()
        self._event.end = time.perf_counter()

    def wait(self) -> Tensor:
        """Block until the result is there. May be called once."""
        recorder, event = self._axis.recorder, self._event
        if recorder.board:
            recorder.board.enter(event.number, event.op, event.axis, event.shape)
        if self._landed:
            self._landed.result()
        else:
            self._land()
        if recorder.board:
            recorder.board.leave()
        return self._finish()


def own_part(flat: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """A rank's own part of `flat` [sum(sizes)], all parts in rank order: a view [sizes[rank]]."""
    return flat.narrow(0, sum(sizes[: axis.rank]), sizes[axis.rank])


def ring_bytes(whole: int, ranks: int) -> float:
    """Bytes that each of `ranks` sends to all_reduce `whole` bytes, on average: not always a whole number."""
    return 2 * (ranks - 1) * whole / ranks


def all_reduce(tensor: Tensor, axis: Axis, op: str = "all_reduce") -> Pending:
    """Sum `tensor` over `axis`, in place."""
    event = axis.begin(op, ring_bytes(_bytes(tensor), axis.size), tensor)
    if axis.size == 1:
        return Pending(axis, event, (), lambda: tensor)
    if axis.size == 2 and _bytes(tensor) <= SMALL and not tensor.is_cuda:
        other = torch.empty_like(tensor)
        works = _exchange([tensor, tensor], [other, other], axis, tag=1)
        return Pending(axis, event, works, lambda: tensor.add_(other))
    return Pending(axis, event, (_work(dist.all_reduce(tensor, group=axis.group, async_op=True)),), lambda: tensor)


def reduce_scatter(flat: Tensor, sizes: Sequence[int], axis: Axis, dtype: torch.dtype) -> Pending:
    """Sum `flat` [sum(sizes)] over `axis` and keep this rank's part [sizes[rank]], summed in `dtype`.

    The bytes travel in `flat`'s own dtype; `flat` must be left alone until the wait is over.
    """
    own = own_part(flat, sizes, axis)
    event = axis.begin("reduce_scatter", _bytes(flat) - _bytes(own), flat)
    if axis.size == 1:
        return Pending(axis, event, (), lambda: own.to(dtype))
    if flat.is_cuda:
        wide = [part.to(dtype) for part in torch.split_with_sizes(flat, list(sizes))]
        total = torch.empty_like(wide[axis.rank])
        work = dist.reduce_scatter(total, wide, group=axis.group, async_op=True)
        return Pending(axis, event, (_work(work),), lambda: total)
    others = [own if rank == axis.rank else torch.empty_like(own) for rank in range(axis.size)]
    works = _exchange(torch.split_with_sizes(flat, list(sizes)), others, axis, tag=2)

    def add() -> Tensor:
        total = torch.add(others[0].to(dtype), others[1])
        for other in others[2:]:
            total.add_(other)
        return total

    return Pending(axis, event, works, add)


def all_gather(flat: Tensor, sizes: Sequence[int], axis: Axis) -> Pending:
    """Fill `flat` [sum(sizes)] with every rank's part, in place; this rank's own part must already lie in it."""
    own = own_part(flat, sizes, axis)
    event = axis.begin("all_gather", _bytes(own) * (axis.size - 1), flat)
    if axis.size == 1:
        return Pending(axis, event, (), lambda: flat)
    parts = list(torch.split_with_sizes(flat, list(sizes)))
    if flat.is_cuda:
        work = dist.all_gather(parts, own, group=axis.group, async_op=True)
        return Pending(axis, event, (_work(work),), lambda: flat)
    return Pending(axis, event, _exchange([own] * axis.size, parts, axis, tag=3), lambda: flat)


def all_to_all(
    flat: Tensor,
    sizes: Sequence[int],
    landing: Tensor,
    landing_sizes: Sequence[int],
    axis: Axis,
    op: str = "all_to_all",
) -> Pending:
    """Send each rank its part of `flat` [sum(sizes)]; fill `landing` [sum(landing_sizes)] with what each sends here."""
    event = axis.begin(op, _bytes(flat) - sizes[axis.rank] * flat.element_size(), flat, alike=False)
    if axis.size == 1:
        return Pending(axis, event, (), lambda: landing.copy_(flat))
    counts = list(landing_sizes), list(sizes)
    work = dist.all_to_all_single(landing, flat, *counts, group=axis.group, async_op=True)
    return Pending(axis, event, (_work(work),), lambda: landing)


def pass_on(tensor: Tensor, landing: Tensor, axis: Axis) -> Pending:
    """Send `tensor` to the next rank of `axis`, the last to the first; fill `landing` with what the previous sends."""
    event = axis.begin("send", _bytes(tensor), tensor, alike=False)
    target, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    if tensor.is_cuda:  # as one operation, or each of two ranks could wait for the other to receive
        give = dist.P2POp(dist.isend, tensor, group=axis.group, group_peer=target)
        take = dist.P2POp(dist.irecv, landing, group=axis.group, group_peer=source)
        return Pending(axis, event, dist.batch_isend_irecv([give, take]), lambda: landing)
    sending = _isend(tensor, axis, target, tag=5)  # before receiving, as in _exchange
    return Pending(axis, event, (_irecv(landing, axis, source, tag=5), sending), lambda: landing)


def send(tensor: Tensor, axis: Axis, to: int, tag: int, op: str = "send") -> Pending:
    """Send `tensor` to rank `to` of the axis; it must be left alone until the wait is over. Tags tell messages apart.

    On gloo ranks may ask for messages in any order. NCCL knows no tags: there the order must be the same on both ends.
    """
    event = axis.recorder.launch(op, axis.name, _bytes(tensor), tensor)
    return Pending(axis, event, (_isend(tensor, axis, to, FIRST_TAG + tag),), lambda: tensor)


def receive(landing: Tensor, axis: Axis, source: int, tag: int, op: str = "receive") -> Pending:
    """Fill `landing` with what rank `source` of the axis sends under that tag."""
    event = axis.recorder.launch(op, axis.name, 0, landing)
    return Pending(axis, event, (_irecv(landing, axis, source, FIRST_TAG + tag),), lambda: landing)


def _exchange(outgoing: Sequence[Tensor], incoming: Sequence[Tensor], axis: Axis, tag: int) -> list[dist.Work]:
    """Send `outgoing[r]` to every other rank r of the axis, receive `incoming[r]` from it.

    All sends come first. To a rank that waits for it gloo sends at once, and holds the connection's lock meanwhile: if
    that rank could send here already, gloo's thread would ask for the lock without a pause until all is sent.
    """
    works = []
    for step in range(1, axis.size):  # each step is a permutation of the ranks, so no rank is everyone's target
        target = (axis.rank + step) % axis.size
        if outgoing[target].numel():
            works.append(_isend(outgoing[target], axis, target, tag))
    for step in range(1, axis.size):
        source = (axis.rank - step) % axis.size
        if incoming[source].numel():
            works.append(_irecv(incoming[source], axis, source, tag))
    return works


# The group's own methods: dist.isend and dist.irecv spend as long again on looking up and checking what is known here.


def _isend(tensor: Tensor, axis: Axis, to: int, tag: int) -> dist.Work:
    assert axis.group is not None, "on paper nothing is sent"
    return axis.group.send([tensor], to, tag)


def _irecv(landing: Tensor, axis: Axis, source: int, tag: int) -> dist.Work:
    assert axis.group is not None, "on paper nothing is sent"
    return axis.group.recv([landing], source, tag)


def _work(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the group"
    return work


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
