"""DeepSpeed by itself: what docs/what-the-libraries-do-differently.md says of it is still so."""

import functools
from collections.abc import Callable

import library_work as work
import pytest
import torch
import world

from sandbox.config import Data
from sandbox.engines.deepspeed import UNSUPPORTED
from sandbox.errors import UnsupportedError
from sandbox.plan import find, finest, plan, predict, preload
from sandbox.runtime import launch, warm
from sandbox.trainer import Trainer
from sandbox.verify import Case
from sandbox.verify.cases import TIED, alone

pytestmark = [pytest.mark.parity, pytest.mark.engines]
run = functools.partial(launch, timeout=60)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    warm(*preload("deepspeed"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_float64_becomes_float32_without_a_word(stage: int) -> None:
    assert run(2, work.deepspeed_dtype, stage) == ["torch.float32"] * 2


def test_stage_0_refuses_float64() -> None:
    assert all("unsupported grad type: torch.float64" in error for error in run(2, work.deepspeed_dtype, 0))


def test_float64_is_refused_before_it_runs() -> None:
    case = alone("deepspeed", "zero2", 2, "", dtype="float64")
    assert finest(case.config) == "float32"
    with pytest.raises(UnsupportedError, match=r"cannot run zero2 in float64: .*Set train.dtype: float32"):
        plan(case.config)


def test_stage_0_clips_without_telling_the_norm() -> None:
    assert run(2, work.deepspeed_norm, 0) == [None, None]
    assert run(2, work.deepspeed_norm, 1) == pytest.approx([15**0.5] * 2)


def test_stage_0_has_no_bfloat16_with_accumulation_in_float32() -> None:
    assert all("unsupported mix" in error for error in run(2, work.deepspeed_mix))


def test_stage_3_leaves_small_parameters_whole_by_default() -> None:
    assert run(2, work.stays_whole) == [True, True]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fragments_put_together_are_what_the_public_accessor_returns(stage: int) -> None:
    for whole, own, start in run(2, work.public_and_ours, stage):
        assert torch.equal(whole, torch.tensor([0.0, 1.5, 3.0]).expand(5, 3))
        assert own is not None
        stop = min(start + own.numel(), whole.numel())  # stage 3 pads
        assert torch.equal(own.flatten()[: stop - start], whole.flatten()[start:stop])


def test_stage_2_sends_for_each_microbatch_what_stage_1_sends_once() -> None:
    """That the formulas are right to the byte, the matrix shows."""
    sent = [predict(alone("deepspeed", name, 2, "").config)[0].traffic["all_reduce dp_shard"] for name in TWO]
    assert sent[1] == 3 * sent[0]
    native = predict(alone("native", "zero2", 2, "", dtype="float32").config)[0].traffic["reduce_scatter dp_shard"]
    assert sent[1] == pytest.approx(2 * native, rel=1e-3)


TWO = ("zero1", "zero2")


def test_the_pipeline_clips_all_stages_by_the_norm_of_the_first() -> None:
    first, *others = run(3, work.pipeline_clip)
    assert first == pytest.approx(1.0)
    assert min(others) > 1.1  # 1.4 and 2.2, together 2.8, where 1 was asked for


@pytest.mark.parametrize("stage", [2, 3])
def test_the_pipeline_refuses_zero_2_and_3(stage: int) -> None:
    assert all(
        "ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism" in e
        for e in run(2, work.pipeline_with_zero, stage)
    )
    with pytest.raises(UnsupportedError, match=r"refuses ZeRO-2 and ZeRO-3.*Set mesh\.dp\.strategy: zero1"):
        plan(alone("deepspeed", "pipeline", 2, "", beside={"dp": {"degree": 2, "strategy": f"zero{stage}"}}).config)


def test_a_stage_without_vectors_has_a_group_less_in_zero_1() -> None:
    """And so takes part in fewer sums of the norm than others, who wait for it."""
    assert run(2, work.groups_of_a_stage) == [1, 2]
    beside = {"dp": {"degree": 2, "strategy": "zero1"}}
    with pytest.raises(UnsupportedError, match=r"embedding alone, without a vector.*Set model\.layers: 4"):
        plan(alone("deepspeed", "pipeline", 3, "", beside=beside).config)


def tied_pipelines(strategy: str = "ddp") -> Case:
    """Two pipelines side by side, whose embedding lies on the first stage and on the last of three."""
    model = TIED.model_copy(update={"layers": 4})
    beside = {"dp": {"degree": 2, "strategy": strategy}}
    data = Data(sequence=24, layout="padded")
    return alone("deepspeed", "pipeline", 3, "tied, dp2", beside=beside, model=model, data=data)


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_two_pipelines_with_a_tied_embedding_have_the_gradients_of_one_process(strategy: str) -> None:
    verdict = world.verifier().verify(tied_pipelines(strategy))
    assert verdict.status == "held", verdict.cause
    assert {"all_reduce other", "all_reduce dp_shard", "send pp x dp_shard"} <= set(verdict.traffic)


@pytest.mark.parametrize("forget", [work.ends_forget_each_other, work.replicas_forget_each_other])
def test_a_gradient_that_the_pipelines_do_not_sum_is_found(forget: Callable[[Trainer], None]) -> None:
    verdict = world.verifier().verify(Case(tied_pipelines().config, forget))
    assert verdict.status == "mismatch"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_deepspeed_lacks_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"engine deepspeed cannot run {name}: .{{20}}"):
        find("deepspeed", name)
