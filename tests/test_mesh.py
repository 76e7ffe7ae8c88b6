"""Who is where: on paper as with process groups, as torch itself says it."""

import math

import numpy as np
import pytest
import world
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.config import AXES
from sandbox.errors import MeshError
from sandbox.mesh import Mesh
from sandbox.runtime import launch

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
DEGREES = st.tuples(*[st.integers(1, 3)] * len(AXES)).map(lambda sizes: dict(zip(AXES, sizes, strict=True)))


@pytest.mark.unit
@few
@given(DEGREES)
def test_ranks_are_numbered_with_the_innermost_axis_fastest(degrees: dict[str, int]) -> None:
    grid = np.arange(math.prod(degrees.values())).reshape(tuple(degrees.values()))
    for rank in range(grid.size):
        mesh = Mesh(degrees, rank)
        place = [int(index) for index in np.argwhere(grid == rank)[0]]
        assert [mesh.axis(name).rank for name in AXES] == place
        assert [mesh.axis(name).size for name in AXES] == list(grid.shape)


@pytest.mark.unit
@few
@given(DEGREES, st.sets(st.sampled_from(AXES), min_size=1))
def test_a_flattened_axis_numbers_its_ranks_with_the_first_name_outermost(
    degrees: dict[str, int], some: set[str]
) -> None:
    names = [name for name in AXES if name in some]
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(degrees.values())):
        mesh = Mesh(degrees, rank)
        others = tuple(mesh.axis(name).rank for name in AXES if name not in some)
        axis = mesh.axis(*names)
        assert axis.size == math.prod(degrees[name] for name in names)
        groups.setdefault(others, []).append(axis.rank)
    assert all(ranks == list(range(axis.size)) for ranks in groups.values())


@pytest.mark.unit
def test_an_axis_is_named_by_those_that_are_wide() -> None:
    mesh = Mesh({"pp": 1, "dp_replicate": 2, "dp_shard": 2, "cp": 1, "tp": 1})
    assert mesh.axis("dp_shard", "cp").name == "dp_shard"
    assert mesh.data.name == mesh.everyone.name == "dp_replicate x dp_shard"
    assert mesh.axis("cp").name == "cp"
    assert mesh.axis("dp_shard") is mesh.axis("dp_shard", "tp")


@pytest.mark.unit
def test_a_mesh_on_paper_needs_no_processes() -> None:
    mesh = Mesh({"dp_shard": 1000}, rank=999)
    assert (mesh.world, mesh.axis("dp_shard").rank) == (1000, 999)
    assert mesh.axis("dp_shard").group is None
    with pytest.raises(AssertionError, match="on paper"):
        mesh.submesh("dp_shard")


DEGREES_8 = {"pp": 1, "dp_replicate": 2, "dp_shard": 2, "ep": 1, "cp": 1, "tp": 2}
AXES_8 = [
    ("dp_replicate",),
    ("dp_shard",),
    ("tp",),
    ("dp_replicate", "dp_shard"),
    ("dp_shard", "cp", "tp"),
    AXES,
    ("cp",),
]


@pytest.mark.parity
def test_torch_and_the_paper_agree() -> None:
    for rank, found in enumerate(launch(8, world.places, DEGREES_8, AXES_8, timeout=world.TIMEOUT)):
        paper = Mesh(DEGREES_8, rank)
        for names, (size, place, by_torch, members, gathered) in zip(AXES_8, found, strict=True):
            axis = paper.axis(*names)
            assert (size, place) == (axis.size, axis.rank)
            assert by_torch == [paper.axis(name).rank for name in names if DEGREES_8[name] > 1]
            assert members.index(rank) == place
            assert gathered == members, "messages arrive in the order of the axis"


@pytest.mark.parity
def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(MeshError) as caught:
        launch(2, world.mesh_of, {"dp_replicate": 2, "dp_shard": 2}, timeout=world.TIMEOUT)
    assert str(caught.value) == (
        "the mesh has 4 ranks (dp_replicate 2 x dp_shard 2), but 2 were started. Start 4, or change a degree."
    )
    assert caught.value.exit_code == 2
