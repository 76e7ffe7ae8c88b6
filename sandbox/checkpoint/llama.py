"""Parameters under the names of Hugging Face's Llama, with a config.json that its LlamaForCausalLM loads; and back.

    ours                        Hugging Face
    embed                       model.embed_tokens
    blocks.I.norm1, norm2       model.layers.I.input_layernorm, post_attention_layernorm
    blocks.I.attention.q k v o  model.layers.I.self_attn.q_proj k_proj v_proj o_proj
    blocks.I.mlp.gate up down   model.layers.I.mlp.gate_proj up_proj down_proj
    norm, head                  model.norm, lm_head (absent if tied)

Matrices are the same, [out, in], and no row moves: both rotate features i and i + E/2 of a head of width E as a pair,
by angles position * 10000^(-2i/E). (Meta's own files pair 2i with 2i + 1; to convert those, rows are moved.)
Norms have eps 1e-6. Dropout is a matter of training alone, and is not written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sandbox.checkpoint import whole
from sandbox.checkpoint.folder import facts
from sandbox.config import Model, check
from sandbox.data import END
from sandbox.errors import CheckpointError, ConfigError
from sandbox.model import build

__all__ = ["export", "take_in"]

_PARTS = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
_LIKE_LLAMA = {"norm": "rms", "mlp": "swiglu", "rotary": True, "qk_norm": False}
_FIXED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "pretraining_tp": 1}
"""What no option of ours changes, and what a model that is taken in must have too."""
_ROPE = 10_000.0
_SIZES = {
    "vocab_size": "vocab", "hidden_size": "width", "intermediate_size": "hidden", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "num_key_value_heads": "kv_heads",
}  # fmt: skip


def export(checkpoint: Path, to: Path) -> int:
    """Write the model as `to`/model.safetensors and `to`/config.json -> its number of parameters.

    Raises CheckpointError: damaged, or an option of the model that Llama does not have.
    """
    from safetensors.torch import save_file

    config = facts(checkpoint)["config"]
    model = check(Model, {"init": "standard", **config["model"]}, source=str(checkpoint), prefix="model")
    for name, value in _LIKE_LLAMA.items():
        if getattr(model, name) != value:
            raise CheckpointError(
                f"{checkpoint}: model.{name} {_shown(getattr(model, name))} has no equivalent in Llama, which has "
                f"{_shown(value)}. `sandbox checkpoint merge` writes any model, under our own names."
            )
    tensors = {
        renamed(name.removeprefix("parameters/")): tensor
        for name, tensor in whole.load(checkpoint, "parameters/").items()
    }
    partial = to.with_name(f"{to.name}.partial")
    partial.mkdir()
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    about = llama_config(model, config["data"].get("sequence", 2048), next(iter(tensors.values())).dtype)
    (partial / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    partial.rename(to)
    return sum(tensor.numel() for tensor in tensors.values())


def take_in(source: Path, folder: Path) -> tuple[Path, Model]:
    """Make a checkpoint of step 0 in `folder` out of a Llama of Hugging Face's -> it, and its model's settings.

    Raises CheckpointError: files that are absent or damaged, or a Llama that this model cannot be.
    """
    model = our_model(_json(source / "config.json"), source)
    found = _tensors(source)
    if model.tied:
        found.pop("lm_head.weight", None)  # some write it nevertheless
    wanted = {renamed(name): (name, param.shape) for name, param in build(model, "float32").named_parameters()}
    if wrong := sorted(wanted.keys() ^ found.keys()):
        verb = "is missing" if wrong[0] in wanted else "has no place in this model"
        raise CheckpointError(f"{source}: {wrong[0]} {verb}.")
    tensors = {}
    for theirs, (name, shape) in wanted.items():
        if found[theirs].shape != shape:
            raise CheckpointError(f"{source}: {theirs} is {list(found[theirs].shape)}, config.json says {list(shape)}.")
        wide = torch.promote_types(found[theirs].dtype, torch.float32)
        tensors[f"parameters/{name}"] = found[theirs].to(wide)
    return whole.make(folder, 0, {"model": model.model_dump(mode="json")}, tensors), model


def renamed(name: str) -> str:
    """Hugging Face's name of a parameter: `blocks.3.mlp.up.weight` -> `model.layers.3.mlp.up_proj.weight`."""
    layer, _, kind = name.rpartition(".")
    if not layer.startswith("blocks."):
        return f"{_PARTS[layer]}.{kind}"
    _, index, part = layer.split(".", 2)
    return f"model.layers.{index}.{_PARTS[part]}.{kind}"


def llama_config(model: Model, sequence: int, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.padded_vocab,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.width // model.heads,
        "max_position_embeddings": sequence,
        "rope_theta": _ROPE,
        "rope_scaling": None,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "tie_word_embeddings": model.tied,
        **_FIXED,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": END,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def our_model(llama: Mapping[str, Any], source: Path) -> Model:
    """The settings that make our model this Llama. Raises CheckpointError: none do."""
    file = source / "config.json"
    for name in _SIZES:
        if llama.get(name) is None and name != "num_key_value_heads":
            raise CheckpointError(f"{file}: {name} is missing.")
        if type(llama.get(name, 1)) is not int:
            raise CheckpointError(f"{file}: {name} is {llama[name]!r}, not a whole number.")
    sizes = {ours: llama[theirs] for theirs, ours in _SIZES.items() if theirs in llama}
    bias, width = bool(llama.get("attention_bias")), sizes["width"] // max(1, sizes["heads"])
    rope = llama.get("rope_parameters") or llama.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    said = {
        **llama,
        "rope_theta": llama.get("rope_theta", rope.get("rope_theta", _ROPE)),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "mlp_bias": bool(llama.get("mlp_bias")),
        "head_dim": llama.get("head_dim") or width,
    }
    needed = {"model_type": "llama", "rope_theta": _ROPE, "rope_type": "default", "mlp_bias": bias, "head_dim": width}
    for name, value in {**needed, **_FIXED}.items():
        if said.get(name, value) != value:
            raise CheckpointError(f"{file}: {name} is {said[name]}; this model has {value} only.")
    try:
        return check(Model, {**sizes, "tied": bool(llama.get("tie_word_embeddings")), "bias": bias, **_LIKE_LLAMA})
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _tensors(source: Path) -> dict[str, Tensor]:
    """All tensors of a model in one file or several."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{source}: holds no .safetensors file.")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}).") from None
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}).") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: holds no settings.")
    return tree


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
