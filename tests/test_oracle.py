"""Our transformer against one that nobody here wrote: Hugging Face's Llama, with the same weights, in float64."""

import importlib.util

import own_models
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sandbox.batch import IGNORED, Batch
from sandbox.checkpoint.llama import llama_config, renamed
from sandbox.config import Model
from sandbox.model import Transformer, build, initial, loss_sum
from sandbox.program import replace_parameters
from sandbox.testing import OwnModel

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install -e .[dev]"
    ),
]

EXACT = 1e-12


def ours(config: Model) -> Transformer:
    model = build(config, "float64")
    values = {name: initial(name, p.shape, config, 0, torch.float64) for name, p in model.named_parameters()}
    replace_parameters(model, {name: nn.Parameter(value) for name, value in values.items()})
    return model


def theirs(config: Model, weights: Transformer) -> OwnModel:
    options = llama_config(config, 64, torch.float64)

    def build_llama() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**options))
        named = {renamed(name): param.detach().clone() for name, param in weights.named_parameters()}
        missing, extra = model.load_state_dict(named, strict=False)
        assert not extra
        assert missing == (["lm_head.weight"] if config.tied else [])
        return model

    return OwnModel(build_llama, own_models.predict_next, {})


def batch(config: Model, rows: int = 3, columns: int = 19) -> Batch:
    torch.manual_seed(3)
    tokens = torch.randint(config.vocab, (rows, columns))
    targets = torch.randint(config.vocab, (rows, columns)).masked_fill(torch.rand(rows, columns) < 0.3, IGNORED)
    place = torch.arange(columns)
    return Batch(tokens, targets, place.expand(rows, -1), torch.zeros_like(tokens), torch.arange(rows), place, key=0)


def error(found: Tensor, reference: Tensor) -> float:
    return ((found - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_gradients_are_those_of_hugging_faces_llama(
    tied: bool, kv_heads: int, bias: bool, attention: str
) -> None:
    config = Model(
        layers=3, width=24, heads=4, kv_heads=kv_heads, hidden=37, vocab=41, bias=bias, tied=tied, init="rough"
    )
    model, given = ours(config), batch(config)
    oracle = theirs(config, model)
    llama = oracle.model()
    llama.config._attn_implementation = attention
    logits = model(given)
    loss_sum(logits, given.targets).backward()
    with oracle.precision():
        expected = llama(input_ids=given.tokens).logits
    F.cross_entropy(expected.flatten(0, 1), given.targets.flatten(), reduction="sum").backward()
    assert expected.dtype == torch.float64
    assert error(logits, expected) <= EXACT
    found = {renamed(name): param.grad for name, param in model.named_parameters()}
    wanted = {name: param.grad for name, param in llama.named_parameters()}
    assert found.keys() == wanted.keys()
    assert max(error(found[name], grad) for name, grad in wanted.items()) <= EXACT


def test_another_rotary_convention_would_show() -> None:
    """Meta's own files pair features 2i and 2i + 1: with q and k in that order, the oracle disagrees."""
    config = Model(layers=1, width=16, heads=2, vocab=23, init="rough")
    model, given = ours(config), batch(config)
    oracle = theirs(config, model)
    llama = oracle.model()
    with torch.no_grad(), oracle.precision():
        same = error(model(given), llama(input_ids=given.tokens).logits)
        for name in ("q", "k"):
            weight = model.get_parameter(f"blocks.0.attention.{name}.weight")
            weight.copy_(weight.view(2, 2, 4, 16).transpose(1, 2).reshape(16, 16))
        other = error(model(given), llama(input_ids=given.tokens).logits)
    assert same <= EXACT
    assert other > 0.01


def test_where_only_the_oracles_own_casts_are_left_it_is_float32() -> None:
    """Why the oracle runs all in float64: its norms and angles are float32 otherwise, whatever the model's dtype."""
    config = Model(layers=1, width=16, heads=2, vocab=23, init="rough")
    model, given = ours(config), batch(config)
    llama = theirs(config, model).model()
    with torch.no_grad():
        assert 1e-9 < error(model(given), llama(input_ids=given.tokens).logits) < 1e-5
