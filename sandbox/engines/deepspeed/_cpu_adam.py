"""DeepSpeed's own AdamW on the CPU, `DeepSpeedCPUAdam`: a step in C++, compiled once and ahead of all ranks.

DeepSpeed compiles it where it is first used, in a rank, under a lock that the other ranks wait for. Here the launcher
has it compiled before any rank starts, by DeepSpeed's own builder and into torch's folder of extensions, where it
stays; ranks load what is there.

Its bias correction multiplies powers of the betas up from step to step, and takes them by `pow` where a step does not
follow the last one, which rounds otherwise. So a training that goes on from a checkpoint would differ in the last bit:
`catch_up` counts the steps that were taken before.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sandbox.config import Config
from sandbox.errors import ConfigError

__all__ = ["build", "catch_up", "check", "compiled", "is_own", "optimizer", "wanted"]

TIMEOUT = 900
"""Seconds that the compiler may take: about a minute of two cores' time, and much longer on busy ones."""

_BUILD = """
import signal
signal.signal(signal.SIGINT, lambda *_: None)  # it is ninja's to handle
from sandbox.engines.deepspeed._quiet import deepspeed
from deepspeed.ops.op_builder import CPUAdamBuilder
CPUAdamBuilder().load(verbose=False)
"""


def wanted(config: Config, offload: bool) -> bool:
    """Whether DeepSpeed would take its own AdamW: as it does by default if the optimizer is offloaded."""
    return offload and config.train.optimizer == "adamw"


def check() -> None:
    """Raises ConfigError: it cannot be compiled here."""
    if missing := _missing():
        raise ConfigError(
            f"mesh.dp.offload: with train.optimizer adamw DeepSpeed steps by its CPU Adam, which is compiled, and this "
            f"machine has no {' and no '.join(missing)}. Install that, or set mesh.dp.offload: false."
        )


@cache
def build() -> None:
    """Have DeepSpeed compile it, if it has not yet; once in this process. Tells so on stderr.

    Raises ConfigError: the compiler failed, or had not ended after TIMEOUT seconds.
    """
    if _installed():
        return
    check()
    lock = _library().with_name("lock")
    if not _library().exists():
        _tell("Building DeepSpeed's CPU Adam, once: about a minute")
    if lock.exists():
        _tell(f"Another process seems to be building it. If there is none, remove {lock}")
    environment = {**os.environ, "PATH": _path(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", _BUILD],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment, process_group=0,
    ) as builder:  # fmt: skip
        try:
            said, _ = builder.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"mesh.dp.offload: DeepSpeed's CPU Adam was not built within {TIMEOUT} s. If no other process builds "
                f"it, remove {lock}."
            ) from None
        finally:
            _end(builder)
    if builder.returncode or not _library().exists():
        errors = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()[-1:]
        raise ConfigError(f"mesh.dp.offload: DeepSpeed's CPU Adam cannot be compiled here: {' '.join(errors[:3])}")


def compiled() -> str:
    """Whether it is there, for people."""
    if _installed() or _library().exists():
        return "CPU Adam is built"
    missing = _missing()
    return f"CPU Adam cannot be built: no {' and no '.join(missing)}" if missing else "CPU Adam is built when needed"


def optimizer(ours: torch.optim.Optimizer, offload: bool) -> torch.optim.Optimizer:
    """DeepSpeed's own in the place of torch's AdamW, with its groups, if the optimizer is offloaded. In a rank.

    Raises ConfigError: nobody has built it.
    """
    if not (offload and isinstance(ours, torch.optim.AdamW)):
        return ours
    import cpuinfo
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    _load()
    cpuinfo.get_cpu_info = dict  # asked, by subprocesses in every rank, for a warning about float16
    kept = ("params", "lr", "betas", "eps", "weight_decay")
    groups = [{key: group[key] for key in kept} for group in ours.param_groups]
    own: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True)
    return own


def is_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is DeepSpeed's."""
    return hasattr(optimizer, "ds_opt_adam")


def catch_up(optimizer: Any) -> None:
    """Bring the powers of the betas to where the steps in the optimizer's state have brought them."""
    nothing = torch.zeros(0)
    steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *optimizer.param_groups[0]["betas"], 1e-8, 0.0, True, *[nothing] * 4
        )


def _end(builder: "subprocess.Popen[str]") -> None:
    """End it, if it has not: first so that ninja ends the compilers, and torch takes its lock away.

    Compilers are in groups of their own, and who finds a lock waits for ever.
    """
    for how in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(builder.pid, how)
            builder.wait(20)


def _load() -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from deepspeed.ops.op_builder.builder import OpBuilder

    if _installed() or CPUAdamBuilder.NAME in OpBuilder._loaded_ops:
        return
    spec = importlib.util.spec_from_file_location(CPUAdamBuilder.NAME, _library())
    if spec is None or spec.loader is None or not _library().exists():
        raise ConfigError("mesh.dp.offload: DeepSpeed's CPU Adam is not built. `sandbox run` and `verify` do it.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    OpBuilder._loaded_ops[CPUAdamBuilder.NAME] = module


def _library() -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("cpu_adam", verbose=False)) / "cpu_adam.so"


def _installed() -> bool:
    """Whether DeepSpeed was installed with it, by DS_BUILD_CPU_ADAM=1."""
    found = importlib.util.find_spec("deepspeed")
    folders = (found.submodule_search_locations if found else None) or ()
    return any(path for folder in folders for path in Path(folder, "ops", "adam").glob("cpu_adam_op*"))


def _missing() -> list[str]:
    if _installed():
        return []
    compiler = os.environ.get("CXX", "c++").split()[0]
    needed = {
        f"C++ compiler ({compiler})": shutil.which(compiler),
        "ninja": shutil.which("ninja", path=_path()),
        "headers of Python": Path(sysconfig.get_path("include"), "Python.h").exists(),
    }
    return [name for name, there in needed.items() if not there]


def _path() -> str:
    """PATH, and where pip puts ninja."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
