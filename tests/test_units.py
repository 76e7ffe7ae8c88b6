"""Units cover the model, are whole only while they are in use, and leave nothing but their parts behind."""

from typing import Any

import pytest
import torch
import world

from sandbox.config import Model
from sandbox.model import build
from sandbox.runtime import launch
from sandbox.units import Landing, cut_units

BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("tied", "names", "kept"),
    [
        (False, ["embed", *BLOCKS, "head"], {"blocks.2", "head"}),
        (True, ["root", *BLOCKS], {"root", "blocks.2"}),
    ],
)
def test_units_are_the_embedding_each_block_and_the_head(tied: bool, names: list[str], kept: set[str]) -> None:
    units = cut_units(build(Model(layers=3, tied=tied), "float32"))
    assert [unit.name for unit in units] == names
    assert {unit.name for unit in units if unit.kept} == kept


@pytest.mark.unit
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_exactly_one_unit(tied: bool) -> None:
    model = build(Model(layers=3, tied=tied, bias=True, norm="layer", qk_norm=True), "float32")
    names = [name for unit in cut_units(model) for name in unit.params]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.unit
def test_units_land_in_the_same_memory_but_not_in_that_of_one_under_way() -> None:
    landing, like = Landing(), torch.zeros(1)
    first = landing.take(8, like)
    second = landing.take(8, like)
    assert second.data_ptr() != first.data_ptr(), "the first is not back"
    landing.give(first)
    assert landing.take(4, like) is first
    landing.give(first)
    assert landing.take(9, like).numel() == 9, "the first is too small"


@pytest.mark.unit
def test_a_stage_of_a_pipeline_has_the_units_of_what_it_holds() -> None:
    model = build(Model(layers=3), "float32")
    model.embed = None
    del model.blocks["0"]
    assert [unit.name for unit in cut_units(model)] == ["blocks.1", "blocks.2", "head"]
    model.norm = model.head = None
    assert [unit.name for unit in cut_units(model)] == ["blocks.1", "blocks.2"]


def lifetimes(strategy: str, prepare: Any = None, **sections: dict[str, Any]) -> dict[str, Any]:
    config = world.config(strategy, train={"microbatches": 1}, **sections)
    found = launch(2, world.lifetimes, config, prepare, timeout=world.TIMEOUT)
    assert [{**rank, "held": None} for rank in found] == [{**found[0], "held": None}] * 2
    return found[0]


@pytest.mark.parity
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_only_the_last_units_are_whole_between_forward_and_backward(strategy: str) -> None:
    seen = lifetimes(strategy)
    assert seen["start"] == []
    assert seen["between"] == ["blocks.2", "head"]


@pytest.mark.parity
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_at_most_two_units_are_whole_at_once(strategy: str, prefetch: bool) -> None:
    seen = lifetimes(strategy, mesh={"prefetch": prefetch})
    for phase in ("forward", "backward"):
        assert len(seen[phase]) > 20
        assert max(map(len, seen[phase])) == 2
    early = [whole for whole in seen["forward"] if "head" not in whole]
    assert max(map(len, early)) == 1 + prefetch, "with prefetching, the next one is on its way while one computes"


@pytest.mark.parity
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "prepare", [None, world.recompute_inside, world.recompute_outside], ids=["", "recompute", "recompute with hooks"]
)
def test_only_parts_are_left_after_backward_a_step_and_a_validation(strategy: str, tied: bool, prepare: Any) -> None:
    seen = lifetimes(strategy, prepare, model={"tied": tied})
    assert {key: seen[key] for key in seen if key.startswith("after")} == {
        "after backward": [],
        "after step": [],
        "after validation": [],
    }
    for part, whole in seen["held"].values():
        assert part < 0.6 * whole


@pytest.mark.parity
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_with_tied_weights_the_root_and_two_blocks_are_whole_at_most(strategy: str) -> None:
    seen = lifetimes(strategy, model={"tied": True})
    assert seen["between"] == ["root", "blocks.2"]
    assert max(map(len, [*seen["forward"], *seen["backward"]])) == 3


@pytest.mark.parity
def test_parameters_stay_whole_until_backward_if_they_are_not_to_be_freed() -> None:
    seen = lifetimes("fsdp", mesh={"reshard_after_forward": False})
    assert seen["between"] == ["embed", *BLOCKS, "head"]
    assert seen["after backward"] == []


@pytest.mark.unit
def test_storage_that_is_freed_and_filled_again_keeps_its_views() -> None:
    """What units.py rests on."""
    flat = torch.arange(6.0)
    view = flat[2:4]
    flat.untyped_storage().resize_(0)
    assert flat.untyped_storage().nbytes() == 0
    flat.untyped_storage().resize_(24)
    flat.copy_(torch.arange(6.0) + 1)
    assert view.tolist() == [3.0, 4.0]
