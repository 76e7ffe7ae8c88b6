"""What runs here: devices, collectives, engines."""

import os
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

import torch

from sandbox.config import Config, Data, DataAxis, Mesh, Model, Train
from sandbox.doctor.collectives import exercise
from sandbox.doctor.finding import Finding
from sandbox.errors import SandboxError
from sandbox.plan import compiled, engines, find, strategies
from sandbox.runtime import launch
from sandbox.verify import Case, Verifier, fixture

__all__ = ["collectives", "devices", "engine_states", "versions"]

RANKS = 3  # two would hide who is whose neighbour
TINY = Model(layers=1, width=16, heads=2, hidden=16)


def versions() -> Finding:
    """Of everything that decides what a number here means."""
    own = version("distributed-training-sandbox")
    return Finding("versions", f"sandbox {own}, torch {torch.__version__}, Python {python_version()}")


def devices() -> Finding:
    """What ranks run on, and what they speak by."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = torch.cuda.device_count()
    if not count:
        return Finding("devices", f"{cores} cores, no GPU: ranks speak by gloo")
    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(number) for number in range(count)))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding("devices", f"{cores} cores, {count} GPUs ({names}): ranks speak by NCCL {nccl}, one GPU each")


def collectives() -> Finding:
    """The self-test, on GPUs if there are enough."""
    device = "cuda" if torch.cuda.device_count() >= RANKS else "cpu"
    found = f"{RANKS} ranks, {device}"
    try:
        ranks = launch(RANKS, exercise, timeout=30, device=device)
    except SandboxError as error:
        return Finding(
            "collectives", found, f"The self-test of the collectives did not run: {str(error).splitlines()[0]}"
        )
    wrong = [f"{name} {text} on rank {r}." for r, tests in enumerate(ranks) for name, text in tests.items() if text]
    return Finding("collectives", f"{found}: {', '.join(ranks[0])}", " ".join(wrong).capitalize())


def engine_states() -> list[Finding]:
    """Each engine that is installed, its first strategy of the data axis held against the unsharded run."""
    return [_state(engine, Verifier()) for engine in engines()]


def _state(engine: str, verifier: Verifier) -> Finding:
    try:
        there = version("distributed-training-sandbox" if engine == "native" else engine)
    except PackageNotFoundError:
        return Finding(f"engine {engine}", "not installed")
    name = next(name for name in strategies(engine) if find(engine, name).AXIS == "dp")
    config = Config(
        engine=engine,
        mesh=Mesh(dp=DataAxis(degree=2, strategy=name)),
        model=TINY,
        data=Data(sequence=16),
        train=Train(batch=4),
    )
    for dtype in ("float64", "float32"):
        verdict = verifier.verify(Case(fixture(config, dtype)))
        if verdict.status != "unsupported":
            break
    found = ", ".join(filter(None, (there, f"{name} on 2 ranks {verdict.status}", compiled(engine))))
    wrong = "" if verdict.held else f"Engine {engine} is installed, but {name} {verdict.status}: {verdict.cause}"
    return Finding(f"engine {engine}", found, wrong)
