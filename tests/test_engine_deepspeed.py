"""DeepSpeed by itself: what docs/what-the-libraries-do-differently.md says of it is still so."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import library_work as work
import pytest
import torch
import world

from sandbox.config import Config, Data
from sandbox.engines.deepspeed import UNSUPPORTED, _cpu_adam, compiled
from sandbox.errors import ConfigError, UnsupportedError
from sandbox.plan import find, finest, get_ready, plan, predict, preload
from sandbox.runtime import launch, warm
from sandbox.trainer import Trainer
from sandbox.verify import Case
from sandbox.verify.capture import capture
from sandbox.verify.cases import TIED, alone
from sandbox.verify.compare import assemble, spread
from sandbox.verify.reference import MARGIN

pytestmark = [pytest.mark.parity, pytest.mark.engines]
compiles = pytest.mark.timeout(_cpu_adam.TIMEOUT)
run = functools.partial(launch, timeout=60)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    warm(*preload("deepspeed"))


@pytest.mark.parametrize(("stage", "half"), [(1, False), (1, True), (2, False), (2, True), (3, False)])
def test_float64_becomes_float32_without_a_word(stage: int, half: bool) -> None:
    assert run(2, work.deepspeed_dtype, stage, half) == ["torch.float32"] * 2


def test_stage_3_refuses_float64_where_the_processor_has_float16() -> None:
    assert all("Invalid data type torch.float64" in error for error in run(2, work.deepspeed_dtype, 3, True))


@pytest.mark.parametrize("half", [False, True])
def test_stage_0_refuses_float64(half: bool) -> None:
    assert all("unsupported grad type: torch.float64" in error for error in run(2, work.deepspeed_dtype, 0, half))


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


# DeepSpeed's own AdamW


def offloaded(stage: int = 2, engine: str = "deepspeed") -> Config:
    return alone(engine, f"zero{stage}", 2, "offload", {"offload": True}, optimizer="adamw").config


@functools.cache
def reference() -> tuple[work.Tensors, work.Tensors]:
    """The unsharded run's parameters after three steps of torch's AdamW, and the measured noise in them.

    That is as for gradients (sandbox.verify.reference): sums in another order, and each parameter moved by one unit in
    the last place. What moves by less is known up to its rounding.
    """
    ((after, *others),) = launch(1, work.reference_parameters, offloaded().reference(), timeout=world.TIMEOUT)
    eps = torch.finfo(torch.float32).eps
    noise = {name: torch.tensor(eps) * value.abs().max() for name, value in after.items()}
    for other in others:
        noise = {name: noise[name].clamp(min=most) for name, most in spread(after, other).items()}
    return after, noise


def beyond_noise(config: Config, prepare: Callable[[Trainer], None]) -> float:
    """The largest difference of a parameter after three steps, in units of what is allowed."""
    get_ready(config)
    ranks = launch(2, capture, config, prepare, timeout=world.TIMEOUT)
    found = {name: whole.value for name, whole in assemble([rank.parameters for rank in ranks])[3].items()}
    after, noise = reference()
    assert found.keys() == after.keys()
    return max(most / (MARGIN * noise[name].item()) for name, most in spread(after, found).items())


@compiles
@pytest.mark.parametrize(("engine", "stage"), [("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("accelerate", 2)])
def test_offloaded_adamw_is_deepspeed_s_own_and_steps_as_torch_s(engine: str, stage: int) -> None:
    """That its gradients are right, the matrix shows."""
    warm(*preload(engine))
    assert beyond_noise(offloaded(stage, engine), work.steps_by_its_own) <= 1


@compiles
@pytest.mark.parametrize("tamper", [work.decays_into_the_gradient, work.bias_is_not_corrected, work.forgets_to_decay])
def test_another_adam_than_torch_s_is_found(tamper: Callable[[Trainer], None]) -> None:
    assert beyond_noise(offloaded(), tamper) > 100


@compiles
def test_its_powers_of_betas_round_otherwise_after_a_pause_unless_they_catch_up() -> None:
    get_ready(offloaded())
    straight_on, caught_up, resumed = run(2, work.paused)[0]
    assert torch.equal(caught_up, straight_on)
    assert not torch.equal(resumed, straight_on)


@compiles
def test_what_is_built_is_built_once_and_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    get_ready(offloaded())
    before = _cpu_adam._library().stat()
    capfd.readouterr()
    _cpu_adam.build.__wrapped__()
    assert capfd.readouterr() == ("", "")
    assert _cpu_adam._library().stat() == before
    assert compiled() == "CPU Adam is built"


def test_without_a_compiler_it_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    refusal = r"no C\+\+ compiler \(no-such-compiler\)\. Install that, or set mesh\.dp\.offload: false"
    for config in (offloaded(), offloaded(engine="accelerate")):
        with pytest.raises(ConfigError, match=refusal):
            plan(config)
    assert compiled() == "CPU Adam cannot be built: no C++ compiler (no-such-compiler)"
    plan(alone("deepspeed", "zero2", 2, "offload", {"offload": True}).config)  # SGD is torch's


def test_a_compiler_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("false") or "")
    assert compiled() == "CPU Adam is built when needed"
    with pytest.raises(ConfigError, match=r"DeepSpeed's CPU Adam cannot be compiled here: .*rror"):
        _cpu_adam.build.__wrapped__()
    assert "Building DeepSpeed's CPU Adam, once: about a minute" in capfd.readouterr().err
