"""Expert parallelism beyond the matrix: bytes by what was routed, idle experts and ranks, validation, recomputation."""

from pathlib import Path

import checkpoint_work
import expert_work
import pytest
import torch
import world

from sandbox.config import Config, Data
from sandbox.plan import predict
from sandbox.runtime import launch
from sandbox.verify import Case
from sandbox.verify.cases import EVERY, SWITCH, alone

pytestmark = pytest.mark.parity

EP2, EP3, EP4 = (alone("native", "expert", degree, "").config for degree in (2, 3, 4))
OF_FOUR = alone("native", "expert", 2, "", beside={"dp": {"degree": 4, "strategy": "fsdp"}}).config


@pytest.mark.parametrize("config", [EP2, EP4, OF_FOUR], ids=["ep 2", "ep 4", "dp 4, ep 2"])
def test_bytes_are_those_of_the_pairs_that_travelled(config: Config) -> None:
    ranks = launch(config.mesh.world, expert_work.one_step, config, timeout=world.TIMEOUT)
    experts, degree = config.model.experts, config.mesh.ep.degree
    owner = [rank for rank, held in enumerate(torch.arange(experts).tensor_split(degree)) for _ in held]
    predictions = predict(config)
    for number, rank in enumerate(ranks):
        group = ranks[number - rank.place :][:degree]
        assert len(rank.chosen) == config.model.layers * config.train.microbatches
        away = sum(n for counts in rank.chosen for n, who in zip(counts, owner, strict=True) if who != rank.place)
        here = sum(
            n
            for other in group
            for counts in other.chosen
            for n, who in zip(counts, owner, strict=True)
            if other is not rank and who == rank.place
        )
        assert rank.sent["all_to_all ep"] == 2 * (away + here) * config.model.width * 8
        assert predictions[number].least["all_to_all ep"] < rank.sent["all_to_all ep"]
        assert rank.sent["all_to_all ep"] < predictions[number].traffic["all_to_all ep"]


def test_bounds_meet_where_every_token_goes_to_every_expert() -> None:
    config = EP3.model_copy(update={"model": EVERY})
    for rank in predict(config):
        assert rank.least["all_to_all ep"] == rank.traffic["all_to_all ep"] > 0


@pytest.mark.parametrize("config", [EP3, OF_FOUR], ids=["ep 3", "dp 4, ep 2"])
def test_ranks_without_a_token_for_their_experts_hold(config: Config) -> None:
    found = world.ranks(config, expert_work.to_two_experts)
    assert world.worst(found, world.alone(config, expert_work.to_two_experts)) < world.EXACT
    idle = [piece.local for rank in found for name, piece in rank.gradients[0].items() if ".experts.4." in name]
    assert idle
    assert not any(torch.as_tensor(grad).any() for grad in idle)


@pytest.mark.parametrize("tamper", [world.validate_between, world.recompute_inside, world.recompute_outside])
def test_forward_may_run_more_often(tamper: world.Prepare) -> None:
    assert world.worst(world.ranks(OF_FOUR, tamper), world.alone(OF_FOUR)) < world.EXACT


def test_validation_has_no_routing_loss_and_is_that_of_one_process() -> None:
    train = {"steps": 2}
    sharded = EP2.model_copy(update={"train": EP2.train.model_copy(update=train)})
    (alone_,) = launch(1, world.steps_and_validation, sharded.reference(), timeout=world.TIMEOUT)
    for steps, validations in launch(2, world.steps_and_validation, sharded, timeout=world.TIMEOUT):
        assert steps == [pytest.approx(step, rel=1e-12) for step in alone_[0]]
        assert validations == pytest.approx(alone_[1], rel=1e-12)


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    undisturbed = launch(4, checkpoint_work.straight_on, OF_FOUR, tmp_path, 1, timeout=world.TIMEOUT)
    resumed = launch(4, checkpoint_work.resume, OF_FOUR, tmp_path, timeout=world.TIMEOUT)
    assert [step for step, *_ in resumed[0][0]] == [2, 3]
    torch.testing.assert_close(resumed, undisturbed, rtol=0, atol=0)


def test_padded_rows_and_one_expert_a_token_hold_beside_all_axes() -> None:
    beside = {"dp": {"degree": 2, "strategy": "zero2"}, "cp": {"degree": 2}, "tp": {"degree": 2, "sequence": True}}
    data = Data(sequence=24, layout="padded")
    verdict = world.verifier().verify(alone("native", "expert", 2, "all", model=SWITCH, data=data, beside=beside))
    assert verdict.status == "held", verdict.cause


def test_a_figure_out_of_bounds_is_a_mismatch() -> None:
    verdict = world.verifier().verify(Case(EP2, expert_work.sent_four_times))
    assert verdict.status == "mismatch"
    assert verdict.cause.startswith("bytes: rank 0 sent")
    assert "(all_to_all ep) where the formula says" in verdict.cause
