"""Every native strategy trains as one process does, whatever is unused, recomputed, validated or cut to nothing."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import world
from world import EXACT, NATIVE

from sandbox.runtime import launch

pytestmark = pytest.mark.parity

STRATEGY = pytest.mark.parametrize("strategy", NATIVE)
TINY = {"width": 4, "hidden": 1, "norm": "rms"}
GATHERING = pytest.mark.parametrize("strategy", ["zero3", "fsdp"])


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        pytest.param(0, 0, id="everywhere"),
        pytest.param(6, 11, id="on rank 0"),
        pytest.param(0, 3, id="on rank 1, and on rank 0 in the last microbatch"),
        pytest.param(3, 6, id="on rank 1, and on rank 0 in the first microbatch"),
    ],
)
@pytest.mark.parametrize(
    ("strategy", "sync"),
    [("zero1", {}), *product(("ddp", "zero2", "zero3", "fsdp"), ({"sync": "last"}, {"sync": "each"}))],
)
def test_an_unused_parameter_trains_as_if_its_gradient_were_zero(
    strategy: str, sync: dict[str, str], start: int, stop: int
) -> None:
    config = world.config(strategy, mesh=sync)
    prepare = partial(world.unused_parameter, start=start, stop=stop)
    found, reference = world.ranks(config, prepare), world.alone(config, prepare)
    assert world.worst(found, reference) <= EXACT
    grads = [step["blocks.2.attention.k_norm.weight"].local for step in reference.gradients]
    assert all(bool(grad.any()) == (stop > start) for grad in grads), "used by the reference only if by some rows"
    assert world.worst(found, world.alone(config)) > 1e-3, "or nothing was planted"


@STRATEGY
def test_a_matrix_that_no_step_uses_still_decays(strategy: str) -> None:
    decayed = "blocks.2.attention.k.weight"
    config = world.config(strategy, train={"lr": 0.1})
    found = world.ranks(config, world.deaf_to_keys)
    reference = world.alone(config, world.deaf_to_keys)
    assert world.worst(found, reference) <= EXACT
    first, *_, last = (step[decayed].local for step in reference.parameters)
    assert not reference.gradients[0][decayed].local.any()
    assert last.norm() < 0.99 * first.norm()


@STRATEGY
@pytest.mark.parametrize(
    ("degree", "sections"),
    [
        pytest.param(4, {"mesh": {"replicas": 4}}, id="as many replicas as ranks"),
        pytest.param(5, {"train": {"batch": 5, "microbatches": 1}}, id="five ranks, one row each"),
        pytest.param(6, {"model": TINY, "mesh": {"replicas": 2}, "train": {"batch": 12}}, id="fewer rows than ranks"),
    ],
)
def test_corners_have_parity(strategy: str, degree: int, sections: dict[str, Any]) -> None:
    config = world.config(strategy, degree, **sections)
    assert world.worst(world.ranks(config), world.alone(config)) <= EXACT


@GATHERING
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_one_block_has_parity(strategy: str, tied: bool) -> None:
    config = world.config(strategy, model={"layers": 1, "tied": tied})
    assert world.worst(world.ranks(config), world.alone(config)) <= EXACT


@STRATEGY
def test_adamw_has_parity_up_to_its_amplified_rounding(strategy: str) -> None:
    config = world.config(strategy, 3, train={"optimizer": "adamw", "lr": 1e-3})
    assert world.worst(world.ranks(config), world.alone(config)) <= 1e-9


@STRATEGY
def test_a_run_repeats_to_the_bit(strategy: str) -> None:
    config = world.config(strategy, 3, train={"dtype": "float32"})
    pairs = zip(world.ranks(config), world.ranks(config), strict=True)
    assert all(world.same_bits(one, other) for one, other in pairs)


def test_other_dropout_is_seen() -> None:
    config, other = (world.config("ddp", model={"dropout": rate}) for rate in (0.5, 0.4))
    assert world.worst(world.ranks(config), world.alone(other)) > 1e-3


@GATHERING
def test_prefetching_changes_no_bit(strategy: str) -> None:
    on, off = (world.ranks(world.config(strategy, 3, mesh={"prefetch": value})) for value in (True, False))
    assert all(world.same_bits(one, other) for one, other in zip(on, off, strict=True))


@pytest.mark.parametrize("how", [world.recompute_inside, world.recompute_outside])
@pytest.mark.parametrize(("strategy", "tied"), [("ddp", False), *product(("zero3", "fsdp"), (False, True))])
def test_activations_may_be_recomputed(strategy: str, how: Any, tied: bool) -> None:
    config = world.config(strategy, 3, model={"dropout": 0.2, "tied": tied})
    assert world.worst(world.ranks(config, how), world.alone(config)) <= EXACT


@GATHERING
def test_activations_may_be_recomputed_without_prefetching(strategy: str) -> None:
    config = world.config(strategy, mesh={"prefetch": False})
    assert world.worst(world.ranks(config, world.recompute_outside), world.alone(config)) <= EXACT


@pytest.mark.parametrize(("strategy", "tied"), [*product(NATIVE, [False]), ("zero3", True), ("fsdp", True)])
def test_validating_between_steps_changes_no_bit_of_the_training(strategy: str, tied: bool) -> None:
    config = world.config(strategy, model={"dropout": 0.2, "tied": tied})
    pairs = zip(world.ranks(config), world.ranks(config, world.validate_between), strict=True)
    assert all(world.same_bits(without, with_) for without, with_ in pairs)


@pytest.fixture(scope="module")
def alone() -> tuple[list[tuple[float, ...]], list[float]]:
    config = world.config().reference()
    return launch(1, world.steps_and_validation, config, timeout=world.TIMEOUT)[0]


@STRATEGY
def test_all_ranks_report_the_loss_of_the_whole_batch(
    strategy: str, alone: tuple[list[tuple[float, ...]], list[float]]
) -> None:
    ranks = launch(3, world.steps_and_validation, world.config(strategy, 3), timeout=world.TIMEOUT)
    steps, validation = alone
    assert validation[0] > validation[1] == validation[2]
    for rank in ranks:
        assert rank[0] == [pytest.approx(step, rel=EXACT) for step in steps]
        assert rank[1] == pytest.approx(validation, rel=EXACT)
        assert rank == ranks[0]
