"""Accelerate by itself: what docs/what-the-libraries-do-differently.md says of it is still so."""

import functools
import importlib.metadata
import inspect
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import accelerate.inference
import library_work as work
import pytest

from sandbox.engines.accelerate import UNSUPPORTED
from sandbox.errors import ConfigError, UnsupportedError
from sandbox.plan import find, missing, plan, preload
from sandbox.runtime import launch, warm
from sandbox.verify.cases import alone

pytestmark = [pytest.mark.parity, pytest.mark.engines]
ROOT = Path(__file__).parent.parent
run = functools.partial(launch, timeout=60)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    warm(*preload("accelerate"))


def test_an_fsdp_plugin_is_ignored_on_cpu_without_a_word() -> None:
    assert run(2, work.prepared, False) == ["DistributedDataParallel"] * 2
    assert run(2, work.prepared, True) == ["FSDPLinear"] * 2


def test_a_parallelism_config_is_refused_on_cpu() -> None:
    assert all("but got DistributedType.MULTI_CPU" in error for error in run(2, work.parallelism))


def test_the_usual_loop_takes_a_mean_of_means_over_microbatches_and_ranks() -> None:
    counts = [[1, 3], [2, 2]]  # tokens; 18 / 8 is the mean over all of them
    assert run(2, work.mean_of_means, counts) == [2.0, 2.0]
    assert run(2, work.mean_of_means, [[2, 2], [2, 2]]) == [2.0, 2.0]  # equal counts hide it


def test_backward_takes_the_step_under_the_deepspeed_plugin() -> None:
    for after_backward, after_step in run(2, work.plugin_steps):
        assert after_backward == after_step == pytest.approx(0.5, abs=1e-5)


def test_the_deepspeed_plugin_needs_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 1}})
    version = importlib.metadata.version

    def absent(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(importlib.metadata.PackageNotFoundError, match="transformers"):
        plugin.set_deepspeed_weakref()


def test_context_parallelism_is_torch_s_which_has_no_rule_for_attention_on_cpu() -> None:
    source = inspect.getsource(accelerate.Accelerator._prepare_cp)
    assert "from torch.distributed.tensor.experimental import context_parallel" in source
    assert all("flash_attention_for_cpu" in error for error in run(2, work.context_parallel))


def test_pipelines_are_for_inference() -> None:
    assert "pipeline parallel inference" in str(accelerate.inference.prepare_pippy.__doc__)
    assert not [name for name in vars(accelerate.ParallelismConfig(tp_size=1)) if name.startswith("pp")]


@pytest.mark.parametrize("file", sorted((ROOT / "launch" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_launch_starts_the_ranks(file: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", port, "-m", "sandbox"]
    command += ["run", ROOT / "configs" / "engines" / f"accelerate_{file.stem}.yaml", "--folder", tmp_path]
    command += ["--set", "train.steps=2", "--set", "train.eval_batches=1"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{file.stem} on 2 ranks" in done.stdout
    assert "step 2  validation loss" in done.stdout


def test_accelerate_cuts_no_tensors_itself() -> None:
    assert all("undergo tensor parallel before" in error for error in run(2, work.accelerate_tensor))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_accelerate_lacks_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"engine accelerate cannot run {name}: .{{20}}"):
        find("accelerate", name)


def test_an_engine_that_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find_spec(name))
    assert missing("accelerate") == ["accelerate"]
    with pytest.raises(ConfigError, match=r"needs accelerate, .*pip install 'distributed-training-sandbox\[engines\]'"):
        plan(alone("accelerate", "ddp", 2, "").config)
    assert not missing("native")
