"""Bytes that a rank sends: by the collectives it calls, and as the kernel counts them on a network interface.

comm.py records its own collectives. `Traffic` adds those that libraries call past it, from Python or from C++ (DDP's
reducer too: a process group dispatches all its collectives as operators), at the least bytes that the collective can
send, whatever the backend makes of it:

    all_reduce          2 (n-1)/n P           all_gather     (n-1) P
    reduce_scatter      P - own part          all_to_all     P - own part
    broadcast, scatter  the root: to n-1      reduce, gather all but the root: P
    send                P

P: bytes of the tensors that this rank gives, n: ranks of the group. What the wire really carries, headers and a
backend's detours included, is what `interface_bytes` is for.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.nn.utils import clip_grad

from sandbox import comm
from sandbox.comm import ring_bytes
from sandbox.errors import MeshError
from sandbox.measure.operations import Operations
from sandbox.mesh import Mesh
from sandbox.recorder import Event

__all__ = ["Traffic", "interface_bytes"]

COLLECTIVES = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "reduce_scatter": "reduce_scatter",  # before `reduce`, which it begins with
    "reduce": "reduce",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
}
"""Beginning of an operator's name, without a leading `_` -> the collective. Other operators send no tensor."""


class Traffic(Operations):
    """While entered, records what libraries send, in the recorder of `mesh`, as comm.py does: "all_gather dp_shard".

    The axis is the one whose ranks form the process group, or "other". Bytes that report or steer rather than train are
    kept apart, as no formula is about them: under "norm" what torch's `clip_grad_norm_` sends, and under "control" what
    is integers or single numbers (indices of buckets, flags).
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._recorder = mesh.recorder
        self._axes = dict(_axes(mesh.degrees, mesh.rank))

    def operate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an operation that is a collective."""
        event = None
        if func.namespace in ("c10d", "_c10d_functional") and not _called_from(comm.__file__):
            event = self._record(func, args)
        out = func(*args, **kwargs)
        if event and self._recorder.detailed:
            _note_end(event, out)
        return out

    def _record(self, func: Any, args: Any) -> Event | None:
        name = func._schema.name.partition("::")[2].lstrip("_")
        op = next((op for begin, op in COLLECTIVES.items() if name.startswith(begin)), None)
        if op is None:
            return None
        call = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        group = _group(call)
        axis = self._axes.get(tuple(sorted(dist.get_process_group_ranks(group))), "other")
        given = list(_flat(_given(call)))
        if _called_from(clip_grad.__file__):
            kind = "norm"
        elif given and all(t.numel() == 1 or not t.is_floating_point() for t in given):
            kind = "control"
        else:
            kind = op
        return self._recorder.launch(kind, axis, _sent(op, call, group))


def interface_bytes(interface: str = "lo") -> int:
    """Bytes sent so far by a network interface of this process's network namespace, headers included."""
    # not /sys/class/net: that shows the namespace in which /sys was mounted
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        name, colon, counts = line.partition(":")
        if colon and name.strip() == interface:
            return int(counts.split()[8])  # eight columns of what was received come first
    raise MeshError(f"there is no network interface {interface} here.")


def _sent(op: str, call: Mapping[str, Any], group: dist.ProcessGroup) -> float:
    """Bytes that this rank sends for a collective: the table above."""
    given = _given(call)
    ranks, whole = group.size(), sum(t.numel() * t.element_size() for t in _flat(given))
    others = whole - _own(call, given, whole, group)
    root = call.get("root_rank", call.get("src")) == group.rank()
    return {
        "all_reduce": ring_bytes(whole, ranks),
        "all_gather": (ranks - 1) * whole,
        "reduce_scatter": others,
        "all_to_all": others,
        "broadcast": (ranks - 1) * whole if root else 0,
        "scatter": others if root else 0,
        "reduce": 0 if root else whole,
        "gather": 0 if root else whole,
        "send": whole,
    }[op]


def _own(call: Mapping[str, Any], given: Any, whole: int, group: dist.ProcessGroup) -> int:
    """Bytes of the part that a rank gives to itself."""
    if splits := call.get("input_split_sizes"):
        return int(whole * splits[group.rank()] // max(1, sum(splits)))
    parts = given[0] if isinstance(given, list) and given and isinstance(given[0], list) else given
    if isinstance(parts, list) and len(parts) == group.size():
        return sum(t.numel() * t.element_size() for t in _flat(parts[group.rank()]))
    return whole // group.size()


def _given(call: Mapping[str, Any]) -> Any:
    """The argument that holds what this rank gives. Operators that work in place call it just `tensors`."""
    names = [name for name in call if name.startswith("input") and not name.endswith("sizes")]
    return call[names[0] if names else "tensors"]


def _flat(tensors: Any) -> Iterator[Tensor]:
    if isinstance(tensors, Tensor):
        yield tensors
    else:
        for item in tensors:
            yield from _flat(item)


def _group(call: Mapping[str, Any]) -> dist.ProcessGroup:
    group = call.get("process_group", call.get("group_name"))
    if isinstance(group, str):
        group = distributed_c10d._resolve_process_group(distributed_c10d.GroupName(group))  # type: ignore[attr-defined]
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def _axes(degrees: Mapping[str, int], rank: int) -> Iterator[tuple[tuple[int, ...], str]]:
    """For each axis that `rank` is on, and each product of axes: the ranks along it, and its name."""
    wide = {name: degree for name, degree in degrees.items() if degree > 1}
    grid = torch.arange(math.prod(wide.values())).view(tuple(wide.values()))
    here = dict(zip(wide, (grid == rank).nonzero()[0].tolist(), strict=True))
    for count in range(1, len(wide) + 1):
        for names in combinations(wide, count):
            line = grid[tuple(slice(None) if name in names else here[name] for name in wide)]
            yield tuple(line.flatten().tolist()), " x ".join(names)


def _called_from(file: str) -> bool:
    """Whether a function of `file` is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame is not None


def _note_end(event: Event, out: Any) -> None:
    """Have the time noted when the collective ends. gloo tells it of some only to whoever waits: then it stays 0."""
    work = out[-1] if isinstance(out, (list, tuple)) else out
    if isinstance(work, torch.ScriptObject):
        with suppress(RuntimeError):
            dist.Work.unbox(work).get_future().add_done_callback(lambda _: setattr(event, "end", time.perf_counter()))
