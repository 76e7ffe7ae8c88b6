"""Configs of DeepSpeed and Accelerate, written from ours and read into ours, and the command for torchrun.

A library's file says less than ours, or other things. Each of its keys, when it is read, is one of three:

    carried        it has a field of ours
    left out       it changes nothing that is computed (buckets, logging, where checkpoints go): told, as a note
    refused        it does, and ours has no counterpart: ConfigError, a line for each such key

What a file of theirs has no place for when ours is written (DeepSpeed's has no model, Accelerate's no optimizer) is
told as a note too; what would become another training is refused.
"""

import json
import shlex
from pathlib import Path
from textwrap import shorten

import yaml

from sandbox.config import Config, check
from sandbox.errors import ConfigError
from sandbox.interchange import accelerate, deepspeed
from sandbox.interchange.keys import Keys, Text, leaves, refuse_all

__all__ = ["TARGETS", "Text", "export", "read"]

TARGETS = ("deepspeed-json", "accelerate-yaml", "torchrun")


def export(config: Config, target: str, path: Path) -> Text:
    """The config of `target`'s library for the training of `config`, read from `path`.

    Raises ConfigError: the library has no such training; a line for each setting.
    """
    if target not in TARGETS:
        raise ConfigError(f"--to {target}: is not one of {', '.join(TARGETS)}.")
    if target == "torchrun":
        start = f"torchrun --standalone --nproc-per-node {config.mesh.world} -m sandbox run {shlex.quote(str(path))}"
        return Text(f"{start}\n", [])
    wrong = [
        f"mesh.{axis}.degree {getattr(config.mesh, axis).degree}: it is set up in the program, not in this file"
        for axis in ("pp", "ep", "cp")
        if getattr(config.mesh, axis).degree > 1
    ]
    if config.train.dtype == "float64":
        wrong.append("train.dtype float64: it computes in float32 or less. --set train.dtype=float32")
    text = deepspeed.write(config, wrong) if target == "deepspeed-json" else accelerate.write(config, wrong)
    refuse_all(str(path), f"cannot be said in {target}", wrong)
    return text


def read(path: Path, *, engine: str = "native", ranks: int | None = None) -> tuple[Config, list[str]]:
    """Our config for a DeepSpeed JSON or an Accelerate YAML, to be run by `engine`, and notes of what was left out.

    `ranks`: data ranks, where the file does not say. Raises ConfigError: unreadable, or keys that cannot be carried.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ConfigError(f"{path}: is not {kind}: {shorten(str(error), 300)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not the settings of a library.")
    keys = Keys(str(path), dict(leaves(tree)))
    library = accelerate if {"distributed_type", "compute_environment"} & tree.keys() else deepspeed
    ours = library.read(keys, ranks)
    if ours["mesh"]["dp"].get("offload") and engine == "native":
        keys.refuse("offload_optimizer", "cpu", "only the library itself does that: --engine deepspeed")
    keys.done()
    return check(Config, {"name": path.stem, "engine": engine, **ours}, source=str(path)), keys.notes
