"""The ranks of a world, arranged along named axes. Built from degrees; with process groups, or on paper."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import cast

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

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
        if len(self._wide) > 1:
            _ = self.device_mesh  # made by all ranks at once, for it makes groups; of one axis it makes none

    @property
    def _wide(self) -> dict[str, int]:
        return {name: degree for name, degree in self.degrees.items() if degree > 1}

    @cached_property
    def device_mesh(self) -> DeviceMesh | None:
        """The same as torch's device mesh, of the axes of degree > 1; None on paper."""
        if self._device is None:
            return None
        return init_device_mesh(self._device, tuple(self._wide.values()), mesh_dim_names=tuple(self._wide))

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
            group = cast(dist.ProcessGroup, dist.new_group(ranks, use_local_synchronization=True))
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
        size = math.prod(self.degrees[name] for name in wide)
        rank = 0
        for name in wide:
            rank = rank * self.degrees[name] + self._coordinate(name)
        group = None
        if self._device and size == self.world:
            group = dist.group.WORLD
        elif size > 1 and self.device_mesh is not None:
            part = self.device_mesh[wide] if len(wide) == 1 else self.device_mesh[wide]._flatten("_".join(wide))
            group = part.get_group()
        return Axis(wide or names[:1], size, rank, group, self.recorder)

    def _coordinate(self, name: str) -> int:
        names = list(self.degrees)
        inner = math.prod(self.degrees[other] for other in names[names.index(name) + 1 :])
        return self.rank // inner % self.degrees[name]
