"""A model that somebody brings along is verified as ours is, and its bugs are found and named."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import own_models as own
import pytest
import torch
from torch import nn

from sandbox.errors import ConfigError, ParityError, SandboxError, UnsupportedError
from sandbox.plan import missing
from sandbox.testing import assert_parity

NEEDS_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install -e .[dev]"
)
PLANS = [
    ("native", "ddp"), ("native", "zero1"), ("native", "zero2"), ("native", "zero3"), ("native", "fsdp"),
    ("torch", "ddp"), ("torch", "zero1"), ("torch", "fsdp"),
]  # fmt: skip
LLAMA = {
    "*.[qkv]_proj": "column",
    "*.o_proj": "row",
    "*.gate_proj": "column",
    "*.up_proj": "column",
    "*.down_proj": "row",
}
ENDS = {"model.embed_tokens": "words", "lm_head": "column, gathered"}
SEQUENCE = {
    "model.embed_tokens": "words, sequence",
    "*layernorm": "shared",
    "model.norm": "shared",
    "*.self_attn": "whole sequence",
    "*.[qkv]_proj": "column",
    "*.o_proj": "row, sequence",
    "*.gate_proj": "column, sequence",
    "*.up_proj": "column, sequence",
    "*.down_proj": "row, sequence",
    "lm_head": "column, sequence, gathered",
}


@pytest.mark.parity
@pytest.mark.parametrize(("engine", "plan"), PLANS)
def test_a_vision_model_keeps_its_gradients(engine: str, plan: str) -> None:
    verdict = assert_parity(own.Vision, own.classify, own.pictures(), plan=plan, engine=engine, ranks=3)
    assert verdict.status == "held"
    assert len(verdict.gradients) == len(list(own.Vision().parameters()))


LIBRARIES = [
    *[(engine, plan) for engine in ("accelerate", "deepspeed") for plan in ("ddp", "zero1", "zero2", "zero3")],
    ("accelerate", "fsdp"), ("fairscale", "zero1"), ("fairscale", "zero2"),
]  # fmt: skip


@pytest.mark.parity
@pytest.mark.engines
@pytest.mark.parametrize(("engine", "plan"), LIBRARIES)
def test_libraries_keep_a_vision_models_gradients(engine: str, plan: str) -> None:
    if lacking := missing(engine):
        pytest.skip(f"{', '.join(lacking)} not installed: pip install -e .[engines]")
    assert_parity(own.Vision, own.classify, own.pictures(), plan=plan, engine=engine, dtype="float32")


@pytest.mark.parity
@pytest.mark.engines
def test_where_a_library_cannot_it_says_why() -> None:
    if missing("deepspeed") or missing("fairscale"):
        pytest.skip("deepspeed and fairscale not installed: pip install -e .[engines]")
    with pytest.raises(UnsupportedError, match="float32"):
        assert_parity(own.Vision, own.classify, own.pictures(), plan="zero1", engine="deepspeed")
    with pytest.raises(UnsupportedError, match="wrappers in the place of blocks"):
        assert_parity(own.Vision, own.classify, own.pictures(), plan="fsdp", engine="fairscale", dtype="float32")


@pytest.mark.parity
@pytest.mark.engines
@NEEDS_TRANSFORMERS
@pytest.mark.parametrize(("engine", "plan"), PLANS)
def test_hugging_faces_llama_keeps_its_gradients(engine: str, plan: str) -> None:
    assert_parity(own.llama, own.predict_next, own.text(), plan=plan, engine=engine)


@pytest.mark.parity
@pytest.mark.engines
@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "plan", [{"tp": {"degree": 2}}, {"tp": {"degree": 2}, "dp": {"degree": 2, "strategy": "zero3"}}]
)
def test_hugging_faces_llama_keeps_its_gradients_under_tensor_parallelism(plan: dict[str, Any], tied: bool) -> None:
    build = functools.partial(own.llama, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    assert_parity(build, own.predict_next, own.text(), plan=plan, modules=LLAMA | ENDS)


@pytest.mark.parity
@pytest.mark.engines
@NEEDS_TRANSFORMERS
@pytest.mark.parametrize(
    "plan", [{"tp": {"degree": 2}}, {"tp": {"degree": 2}, "dp": {"degree": 2, "strategy": "fsdp"}}]
)
def test_hugging_faces_llama_keeps_its_gradients_under_sequence_parallelism(plan: dict[str, Any]) -> None:
    build = functools.partial(own.llama, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    uneven = own.text(columns=11)
    assert_parity(build, own.predict_next_at, uneven, plan=plan, modules=SEQUENCE)
    forgot = {name: kind for name, kind in SEQUENCE.items() if name != "model.norm"}
    with pytest.raises(ParityError, match=r"reduction: .*model\.norm\.weight"):
        assert_parity(build, own.predict_next_at, uneven, plan=plan, modules=forgot)


@pytest.mark.parity
@pytest.mark.parametrize("blocks", [(), "layers.[02]", ("first", "layers"), None])
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_any_choice_of_blocks_will_do(strategy: str, blocks: Any) -> None:
    assert_parity(own.Vision, own.classify, own.pictures(), plan=strategy, blocks=blocks)


@pytest.mark.parity
def test_float32_is_held_against_its_own_noise() -> None:
    verdict = assert_parity(own.Vision, own.classify, own.pictures(), plan="zero2", dtype="float32")
    assert 1e-7 < verdict.tolerance < 1e-3


@pytest.mark.parity
@pytest.mark.parametrize(
    ("build", "loss", "said"),
    [
        (own.Vision, own.mean_of_own_rows, "it counts 1 losses in the whole batch and 11 in its rows"),
        (own.Vision, own.mean_counted_well, "add up to .* (11.0000 times). Return the sum"),
        (own.Random, own.classify, "the same model and rows give another loss. Does it draw random numbers"),
        (own.Normalised, own.classify, "the loss of the whole batch is"),
        (own.Contrasting, own.classify, "the gradient of .* is not the sum of those from its rows"),
        (own.Vision, own.for_each_rank, "scale: every gradient is 2.0000 times the reference (mesh.dp.degree = 2"),
        (own.Vision, own.scaled_on_one_rank, "forward: the loss itself differs by"),
        (own.Counting, own.classify, "buffer: after step 1, values of mean .* ranks hold different values"),
        (own.Leaking, own.classify, "state: all is right up to step 1"),
    ],
)  # fmt: skip
def test_a_bug_is_found_and_named(build: Any, loss: Any, said: str) -> None:
    pattern = re.escape(said).replace(r"\.\*", ".*")
    with pytest.raises(ParityError, match=pattern) as caught:
        assert_parity(build, loss, own.pictures(), plan="zero2")
    assert isinstance(caught.value, AssertionError)


@pytest.mark.parity
def test_a_norm_on_a_ranks_own_features_has_to_be_shared() -> None:
    plan, cut = {"tp": {"degree": 2}}, {"up": "column", "down": "row"}
    assert_parity(own.Inner, own.classify, own.pictures(), plan=plan, modules=cut | {"norm": "shared"})
    with pytest.raises(ParityError, match=r"reduction: .*norm\.weight"):
        assert_parity(own.Inner, own.classify, own.pictures(), plan=plan, modules=cut)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": "zero9"}, "Did you mean zero3?"),
        ({"engine": "torch", "plan": "zero2"}, "engine torch cannot run zero2"),
        ({"ranks": 6}, "leaves a rank without a row"),
        ({"plan": {"dp": {"degree": 2}, "ddp": 2}}, "plan.ddp is not a field"),
        ({"plan": {"pp": {"degree": 2}}}, "Leave out pp, cp and ep"),
        ({"plan": {"tp": {"degree": 2}}}, "modules: say how"),
        ({"modules": {"first": "column"}}, "Add tp to the plan"),
        ({"batch": {"a": torch.ones(3), "b": torch.ones(4)}}, r"rows. Give all as many"),
        ({"batch": {}}, "no rows"),
        ({"dtype": "bfloat16"}, "is not one of 'float64', 'float32'"),
        ({"build_model": lambda: nn.Linear(1, 1)}, "build_model: it cannot be sent to the ranks"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], said: str) -> None:
    arguments = {"build_model": own.Vision, "loss_fn": own.classify, "batch": own.pictures()} | changes
    with pytest.raises(ConfigError, match=re.escape(said)):
        assert_parity(**arguments)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks": "layer.*"}, "blocks: no module of Vision is called 'layer.*'"),
        ({"build_model": own.Entangled, "plan": "zero3"}, "share"),
        ({"build_model": own.Frozen}, "first.weight does not require a gradient"),
        ({"loss_fn": own.no_count}, "loss_fn returned a tensor of shape [] alone"),
        ({"plan": {"tp": {"degree": 2}}, "modules": {"first": "columns"}}, "'columns' is not one of"),
        ({"plan": {"tp": {"degree": 2}}, "modules": {"first": "words"}}, "words is for a Embedding"),
        ({"plan": {"tp": {"degree": 2}}, "modules": {"first": "column"}}, "15 features do not divide over 2 ranks"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_named(changes: dict[str, Any], said: str) -> None:
    arguments = {"build_model": own.Vision, "loss_fn": own.classify, "batch": own.pictures()} | changes
    with pytest.raises(SandboxError, match=re.escape(said)):
        assert_parity(**arguments)


MINE = """
import own_models as own
import pytest

@pytest.mark.parametrize("loss", [own.classify, own.for_each_rank])
def test_mine(assert_parity, loss):
    assert_parity(own.Vision, loss, own.pictures())
"""


@pytest.mark.parity
@pytest.mark.parametrize("spread", [(), ("-n", "1")])
def test_a_session_of_pytest_ends_with_a_page_about_all_that_it_held_together(
    tmp_path: Path, spread: tuple[str, ...]
) -> None:
    (tmp_path / "test_mine.py").write_text(MINE)
    plugins = [] if _plugged() else ["-p", "sandbox.pytest_plugin"]
    command = [sys.executable, "-m", "pytest", "-q", "test_mine.py", *plugins, *spread, "-p", "no:cacheprovider"]
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = functools.partial(subprocess.run, cwd=tmp_path, env=here, capture_output=True, text=True, timeout=100)
    done = run([*command, "--parity-report", "parity.html"])
    assert done.returncode == 1, done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "parity.html: 2 cases: 1 held, 1 mismatch" in done.stdout
    page = (tmp_path / "parity.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("test_mine[classify]", "test_mine[for_each_rank]"))
    wrong = run([*command, "--parity-report", "nowhere/parity.html"])
    assert wrong.returncode == 4
    assert "--parity-report nowhere/parity.html: nowhere is not a folder." in wrong.stderr


def _plugged() -> bool:
    return any(entry.value == "sandbox.pytest_plugin" for entry in entry_points(group="pytest11"))
