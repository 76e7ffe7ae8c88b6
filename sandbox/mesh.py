"""The ranks of a world, arranged along named axes. Built from degrees; with process groups, or on paper."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sandbox.comm import Axis
from sandbox.errors import MeshError
from sandbox.recorder import Recorder

__all__ = ["Mesh"]


class Mesh:
    """Named axes over the ranks, outermost first. Axes of degree 1 need no group and cost nothing.

    `device` None makes a mesh on paper: it answers who is where, for predictions, but cannot communicate.
    """

    def __init__(
        self, degrees: Mapping[str, int], rank: int = 0, device: str | None = None, recorder: Recorder | None = None
    ) -> None:
        self.degrees, self.rank, self.world = dict(degrees), rank, math.prod(degrees.values())
        self.recorder = recorder or Recorder()
        self._device = device if self.world > 1 else None
        self._axes: dict[tuple[str, ...], Axis] = {}
        if self._device and dist.get_world_size() != self.world:
            raise MeshError(
                f"the mesh has {self.world} ranks ({' x '.join(f'{k} {v}' for k, v in self._wide.items())}), "
                f"but {dist.get_world_size()} were started. Start {self.world}, or change a degree."
            )
        for name in self._wide:
            self.axis(name)  # makes its group, in one order on all ranks

    @property
    def _wide(self) -> dict[str, int]:
        return {name: degree for name, degree in self.degrees.items() if degree > 1}

    @cached_property
    def device_mesh(self) -> DeviceMesh | None:
        """The same as torch's device mesh, of the axes of degree > 1; None on paper."""
        if self._device is None:
            return None
        groups = [cast(dist.ProcessGroup, self.axis(name).group) for name in self._wide]
        ranks = torch.arange(self.world).view(*self._wide.values())
        return DeviceMesh.from_group(groups, self._device, ranks, mesh_dim_names=tuple(self._wide))

    def axis(self, *names: str) -> Axis:
        """The axis of that name; of several names, all of them flattened into one, the first outermost."""
        wide = tuple(name for name in names if self.degrees.get(name, 1) > 1)
        if wide not in self._axes:
            self._axes[wide] = self._make(wide, names)
        return self._axes[wide]

    def part(self, name: str, start: int, stop: int) -> Axis:
        """The ranks [start, stop) along an axis as an axis of its own. This rank must be one of them."""
        whole = self.axis(name)
        if (start, stop) == (0, whole.size):
            return whole
        group = None
        if whole.group is not None and stop - start > 1:
            ranks = dist.get_process_group_ranks(whole.group)[start:stop]
            group = _new_group(ranks)
        return replace(whole, size=stop - start, rank=whole.rank - start, group=group)

    @property
    def data(self) -> Axis:
        """All ranks that see other rows: dp_replicate x dp_shard x ep."""
        return self.axis("dp_replicate", "dp_shard", "ep")

    @property
    def everyone(self) -> Axis:
        """All ranks."""
        return self.axis(*self.degrees)

    def submesh(self, *names: str) -> DeviceMesh:
        """The part of torch's device mesh with those axes (of degree > 1), for engines that want one."""
        assert self.device_mesh is not None, "a mesh on paper, or of one rank, has no device mesh"
        return self.device_mesh[tuple(name for name in names if self.degrees[name] > 1)]

    @property
    def data_mesh(self) -> DeviceMesh:
        """All ranks that see other rows, as one axis of torch's device mesh."""
        part = self.submesh("dp_replicate", "dp_shard")
        return part if part.ndim == 1 else part._flatten("dp")

    def _make(self, wide: tuple[str, ...], names: tuple[str, ...]) -> Axis:
        rank = 0
        for name in wide:
            rank = rank * self.degrees[name] + self._coordinate(name)
        size = math.prod(self.degrees[name] for name in wide)
        group = self._group(wide) if self._device and wide else None
        return Axis(wide or names[:1], size, rank, group, self.recorder)

    def _group(self, wide: tuple[str, ...]) -> dist.ProcessGroup:
        """The ranks that differ from this one along those axes only."""
        place = [slice(None) if name in wide else self._coordinate(name) for name in self.degrees]
        ranks = torch.arange(self.world).view(*self.degrees.values())[tuple(place)].flatten().tolist()
        if len(ranks) == self.world:
            return cast(dist.ProcessGroup, dist.group.WORLD)
        return _new_group(ranks)

    def _coordinate(self, name: str) -> int:
        names = list(self.degrees)
        inner = math.prod(self.degrees[other] for other in names[names.index(name) + 1 :])
        return self.rank // inner % self.degrees[name]


def _new_group(ranks: list[int]) -> dist.ProcessGroup:
    """A group of those ranks, for which they alone ask: torch's own device mesh has every rank ask for every group.

    NCCL splits the world's communicator, so there all ranks must ask at the same time, each for a group that it is in.
    """
    return cast(dist.ProcessGroup, dist.new_group(ranks, use_local_synchronization=True))
