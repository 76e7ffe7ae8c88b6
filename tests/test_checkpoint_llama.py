"""A model goes out under Llama's names and comes back, bit by bit; what Llama has not is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_work import one
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sandbox import checkpoint
from sandbox.checkpoint import llama, whole
from sandbox.errors import CheckpointError
from sandbox.layout import local
from sandbox.trainer import Trainer

pytestmark = pytest.mark.unit

LLAMA: dict[str, Any] = {"norm": "rms", "qk_norm": False, "heads": 4, "kv_heads": 2, "layers": 2}


def trained(folder: Path, **model: Any) -> tuple[Trainer, Path]:
    trainer = one(model={**LLAMA, **model})
    trainer.train_step()
    return trainer, checkpoint.save(trainer, folder)


@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_loads_what_goes_out(tmp_path: Path, tied: bool) -> None:
    """That its logits are ours then, test_oracle.py shows."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e .[dev]")
    trainer, saved = trained(tmp_path, tied=tied, bias=True)
    llama.export(saved, tmp_path / "out")
    loaded, told = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float64, output_loading_info=True
    )
    assert not any(told.values()), told
    found = dict(loaded.named_parameters())
    assert len(found) == len(trainer.program.parameters)
    assert all(torch.equal(param, found[llama.renamed(n)]) for n, param in trainer.program.parameters.items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_model_goes_out_and_comes_back(tmp_path: Path, tied: bool, bias: bool) -> None:
    trainer, saved = trained(tmp_path, tied=tied, bias=bias)
    assert llama.export(saved, tmp_path / "out") == sum(p.numel() for p in trainer.program.parameters.values())
    back, model = llama.take_in(tmp_path / "out", tmp_path / "back")
    before, after = (whole.load(path, "parameters/") for path in (saved, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (model.tied, model.bias, model.groups, model.mlp_hidden) == (tied, bias, 2, 19)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert ("lm_head.weight" in names) == (not tied)
    assert ("model.layers.1.self_attn.q_proj.bias" in names) == bias
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"} <= names


def test_what_came_in_is_trained_on_as_step_0(tmp_path: Path) -> None:
    trainer, saved = trained(tmp_path)
    llama.export(saved, tmp_path / "out")
    back, _ = llama.take_in(tmp_path / "out", tmp_path / "back")
    other = one(model={**LLAMA}, train={"optimizer": "adamw", "seed": 4})
    checkpoint.restore(other, back)
    assert other.step == 0
    assert not other.optimizer.state
    for name, param in other.program.parameters.items():
        assert torch.equal(local(param), trainer.program.parameters[name])
    other.train_step()


def test_the_config_says_what_the_model_is(tmp_path: Path) -> None:
    _, saved = trained(tmp_path)
    llama.export(saved, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 257, "hidden_size": 16,
        "intermediate_size": 19, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 4, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": True,
        "mlp_bias": True, "tie_word_embeddings": False, "torch_dtype": "float64", "max_position_embeddings": 12,
    }  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [("norm", "layer", "layer"), ("mlp", "gelu", "gelu"), ("rotary", False, "false"), ("qk_norm", True, "true")],
)
def test_an_option_that_llama_has_not_is_named(tmp_path: Path, option: str, value: Any, shown: str) -> None:
    _, saved = trained(tmp_path, **{option: value})
    with pytest.raises(CheckpointError, match=rf"model\.{option} {shown} has no equivalent in Llama"):
        llama.export(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert whole.save_file(saved, tmp_path / "all.safetensors") == len(whole.load(saved))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "qwen3"}, "config.json: model_type is qwen3; this model has llama only."),
        ({"hidden_act": "gelu"}, "config.json: hidden_act is gelu; this model has silu only."),
        ({"rms_norm_eps": 1e-5}, "config.json: rms_norm_eps is 1e-05; this model has 1e-06 only."),
        ({"rope_theta": 5e5}, "config.json: rope_theta is 500000.0; this model has 10000.0 only."),
        ({"rope_scaling": {"rope_type": "llama3"}}, "config.json: rope_type is llama3; this model has default only."),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 9.0}}, "config.json: rope_theta is 9.0;"),
        ({"mlp_bias": False}, "config.json: mlp_bias is False; this model has True only."),
        ({"head_dim": 8}, "config.json: head_dim is 8; this model has 4 only."),
        ({"hidden_size": None}, "config.json: hidden_size is missing."),
        ({"hidden_size": "16"}, "config.json: hidden_size is '16', not a whole number."),
        ({"num_attention_heads": 3}, "config.json: "),
        ({"intermediate_size": 20}, "mlp.gate_proj.weight is [19, 16], config.json says [20, 16]."),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing."),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight has no place in this model."),
    ],
)
def test_a_llama_that_this_model_cannot_be_is_named(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    _, saved = trained(tmp_path)
    out = tmp_path / "out"
    llama.export(saved, out)
    said = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({k: v for k, v in {**said, **change}.items() if v is not None}))
    with pytest.raises(CheckpointError) as caught:
        llama.take_in(out, tmp_path / "back")
    assert text in str(caught.value)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", b"{"), ("config.json", b"[]"), ("config.json", b"\xff"), ("model.safetensors", b"nothing")],
)
def test_a_damaged_llama_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    _, saved = trained(tmp_path)
    llama.export(saved, tmp_path / "out")
    (tmp_path / "out" / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        llama.take_in(tmp_path / "out", tmp_path / "back")


def test_a_llama_in_several_files_and_half_precision_comes_in(tmp_path: Path) -> None:
    _, saved = trained(tmp_path)
    out = tmp_path / "out"
    llama.export(saved, out)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(out / "model.safetensors").items()}
    (out / "model.safetensors").unlink()
    for number in range(2):
        part = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % 2 == number}
        save_file(part, out / f"model-{number}.safetensors")
    back, _ = llama.take_in(out, tmp_path / "back")
    found = whole.load(back)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert torch.equal(found["parameters/norm.weight"], tensors["model.norm.weight"].float())


def test_a_merged_file_has_everything_under_our_names(tmp_path: Path) -> None:
    trainer, saved = trained(tmp_path)
    assert whole.save_file(saved, tmp_path / "all.safetensors") == len(whole.load(saved))
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert file.metadata() == {"step": "1", "checkpoint": "step-000001"}
        name = "blocks.1.mlp.up.weight"
        assert torch.equal(file.get_tensor(f"parameters/{name}"), trainer.program.parameters[name])
        assert f"optimizer/{name}/momentum_buffer" in file.keys()  # noqa: SIM118 - it is no mapping
    assert not list(tmp_path.glob("*.partial"))
