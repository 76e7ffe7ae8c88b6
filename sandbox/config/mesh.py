"""The mesh, as a config has it: for each axis a degree, a strategy, and that strategy's options."""

import math
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from sandbox.config.base import Count, Section, divisors

__all__ = ["AXES", "Axis", "DataAxis", "Mesh"]

AXES = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")
"""Axes of the device mesh, outermost first: the innermost talks most, so its ranks are neighbours.

`ep` is carved out of the data ranks: all of dp_replicate x dp_shard x ep see other rows.
"""


class Axis(BaseModel):
    """One axis of the mesh. Other keys are the strategy's options, checked by the strategy itself."""

    model_config = ConfigDict(extra="allow", frozen=True)

    degree: Count = 1
    strategy: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What is left for the strategy."""
        return dict(self.model_extra or {})


class DataAxis(Axis):
    """The data axis. `replicas` > 1 shards within groups of degree / replicas and replicates over them (HSDP)."""

    strategy: str = "ddp"
    replicas: Count = 1


class Mesh(Section):
    """Axis -> degree, strategy, options. Axes that are left out have degree 1."""

    pp: Axis = Axis()
    dp: DataAxis = DataAxis()
    ep: Axis = Axis()
    cp: Axis = Axis()
    tp: Axis = Axis()

    @property
    def degrees(self) -> dict[str, int]:
        """Size of every axis of the device mesh, outermost first."""
        replicate, ep = self.dp.replicas, self.ep.degree
        shard = self.dp.degree // replicate // ep
        return dict(zip(AXES, (self.pp.degree, replicate, shard, ep, self.cp.degree, self.tp.degree), strict=True))

    @property
    def world(self) -> int:
        """Number of ranks."""
        return math.prod(self.degrees.values())

    def __str__(self) -> str:
        """Short form for tables: `dp 4`, `dp 2x2`, `-` on one rank."""
        parts = [
            f"{name} {axis.degree}" for name in ("pp", "ep", "cp", "tp") if (axis := getattr(self, name)).degree > 1
        ]
        if self.dp.degree > 1:
            split = (
                f"{self.dp.replicas}x{self.dp.degree // self.dp.replicas}" if self.dp.replicas > 1 else self.dp.degree
            )
            parts.insert(int(self.pp.degree > 1), f"dp {split}")
        return ", ".join(parts) or "-"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        dp, replicas, ep = self.dp.degree, self.dp.replicas, self.ep.degree
        left, uneven = divmod(dp, ep)
        if dp % replicas:
            raise ValueError(
                f"mesh.dp.replicas {replicas} does not divide mesh.dp.degree {dp}. {divisors(dp if uneven else left)}"
            )
        if (ranks := dp // replicas) % ep:
            of = "mesh.dp.degree" + (" / mesh.dp.replicas" if replicas > 1 else "")
            fewer = "" if uneven else f", or mesh.dp.replicas: {left}"
            raise ValueError(
                f"mesh.ep.degree {ep} does not divide {of} {ranks}: experts are cut over data ranks. "
                f"{divisors(ranks)} Or set mesh.dp.degree: {math.ceil(dp / (replicas * ep)) * replicas * ep}{fewer}."
            )
        return self
