"""From a config to the strategies it asks for, and from those to a program: the fold.

A strategy is a module, found by its place: `sandbox/strategies/NAME.py` for the engine `native`,
`sandbox/engines/ENGINE/NAME.py` for another. It has

    AXIS            the mesh axis that it acts on
    Options         its options, a pydantic model
    apply           (program, mesh, options) -> program
    predict         (model on meta, mesh on paper, options, config) -> Prediction

    check           optional: (config, options) -> None, raises ConfigError with the nearest setting that would work
    ahead           optional: (config, options) -> None, what is done once before ranks start, such as to compile
    schedule        optional: (config, options) -> Schedule, who does what when, for `explain` to draw
    columns         optional: (sequence, ranks, order) -> the columns of each rank, for `explain` to draw
    dealt           optional: (config) -> the experts of each rank, for `explain` to draw
    REFUSES         optional: dtype -> why it cannot compute in it
    ROUNDS          optional: in bfloat16, the model's own parameters are bfloat16 too

and its docstring is what `sandbox explain` prints. An engine's package may hold UNSUPPORTED: strategy -> reason,
REQUIRES: the packages that have to be installed, PRELOAD: what to import once instead of in each rank, and `compiled`:
() -> what of it has to be compiled here, and whether it is, for `doctor` to say.
"""

import difflib
import importlib
import importlib.util
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

import sandbox.engines
import sandbox.strategies
from sandbox.config import Config, Options, brief, check
from sandbox.errors import ConfigError, UnsupportedError
from sandbox.layout import Layout
from sandbox.mesh import Mesh
from sandbox.model import build
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, materialise, unsharded
from sandbox.recompute import recompute

__all__ = [
    "USUAL",
    "Planned",
    "Strategy",
    "compiled",
    "engines",
    "find",
    "finest",
    "fold",
    "get_ready",
    "layouts",
    "missing",
    "name_of",
    "plan",
    "predict",
    "preload",
    "required",
    "strategies",
    "unsupported",
]

FOLD = ("pp", "tp", "cp", "ep", "dp")
"""The order in which strategies are folded over the model: each meets what the ones before it have left.

What backward computes again is decided before dp: it includes collectives of the inner axes, but no gathers of weights.
"""

USUAL = {"pp": "pipeline", "tp": "tensor", "cp": "context", "ep": "expert", "dp": "ddp"}
"""The strategy of an axis whose section names none."""


class Strategy(Protocol):
    """A strategy's module."""

    __name__: str
    __doc__: str | None
    AXIS: str
    Options: type[Options]

    def apply(self, program: Program, mesh: Mesh, options: Any) -> Program:
        """Change the program."""

    def predict(self, model: nn.Module, mesh: Mesh, options: Any, config: Config) -> Prediction:
        """Tell bytes sent and held. A strategy that cuts the model cuts `model` too, for those folded after it."""


@dataclass(frozen=True)
class Planned:
    """A strategy with its options, as a config asks for it."""

    strategy: Strategy
    options: Options


def engines() -> list[str]:
    """Names of all engines, ours first."""
    return ["native", *sorted(m.name for m in pkgutil.iter_modules(sandbox.engines.__path__) if m.ispkg)]


def strategies(engine: str) -> list[str]:
    """Names of an engine's strategies."""
    folder = Path(importlib.import_module(_package(engine)).__path__[0])
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))


def unsupported(engine: str) -> dict[str, str]:
    """Strategies that an engine cannot run here, each with the reason."""
    return dict(getattr(importlib.import_module(_package(engine)), "UNSUPPORTED", {}))


def required(engine: str) -> tuple[str, ...]:
    """Packages that an engine needs, beyond what this project cannot do without."""
    return tuple(getattr(importlib.import_module(_package(engine)), "REQUIRES", ()))


def missing(engine: str) -> list[str]:
    """Of those, the ones that are not installed."""
    return [name for name in required(engine) if importlib.util.find_spec(name) is None]


def preload(engine: str) -> list[str]:
    """Modules that every rank of an engine imports, as far as they are installed."""
    return [] if missing(engine) else list(getattr(importlib.import_module(_package(engine)), "PRELOAD", ()))


def find(engine: str, name: str) -> Strategy:
    """The module of a strategy. Raises UnsupportedError with the reason, or ConfigError with the nearest name."""
    if engine not in engines():
        raise ConfigError(f"engine: {brief(engine)} is not an engine. {_nearest(engine, engines())}")
    if name in (reasons := unsupported(engine)):
        raise UnsupportedError(f"engine {engine} cannot run {name}: {reasons[name]}")
    if name not in strategies(engine):
        raise ConfigError(f"{brief(name)} is not a strategy of engine {engine}. {_nearest(name, strategies(engine))}")
    return cast(Strategy, importlib.import_module(f"{_package(engine)}.{name}"))


def plan(config: Config) -> list[Planned]:
    """The strategies of `config` with their options, in the order of the fold; axes of degree 1 are only checked.

    Raises ConfigError: a name or option is wrong, or a package is missing. UnsupportedError: the engine cannot do it.
    """
    active = [planned for planned, active in _resolve(config) if active]
    for planned in active:
        refused = getattr(planned.strategy, "REFUSES", {})
        if reason := refused.get(config.train.dtype):
            name = planned.strategy.__name__.rpartition(".")[2]
            raise UnsupportedError(
                f"train.dtype: engine {config.engine} cannot run {name} in {config.train.dtype}: {reason} "
                f"Set train.dtype: {finest(config)}."
            )
    if lacking := missing(config.engine):
        raise ConfigError(
            f"engine: {config.engine} needs {', '.join(lacking)}, not installed here: "
            "pip install 'distributed-training-sandbox[engines]'."
        )
    return active


def get_ready(config: Config) -> None:
    """Do what the strategies of `config` need done once before ranks start. Raises ConfigError: it cannot be."""
    for planned in plan(config):
        if hasattr(planned.strategy, "ahead"):
            planned.strategy.ahead(config, planned.options)


def compiled(engine: str) -> str:
    """What an engine that is installed has to have compiled here, and whether it is, for people; mostly nothing."""
    say = getattr(importlib.import_module(_package(engine)), "compiled", str)
    return cast(str, say())


def name_of(config: Config) -> str:
    """The strategies at work, for people: `zero2`, `pipeline + ddp`, or `unsharded`."""
    return " + ".join(p.strategy.__name__.rpartition(".")[2] for p in plan(config)) or "unsharded"


def finest(config: Config) -> str:
    """The widest dtype in which the strategies of `config` can compute."""
    wide = [(axis, section) for axis in FOLD if (section := getattr(config.mesh, axis)).degree > 1]
    chosen = [find(config.engine, section.strategy or USUAL[axis]) for axis, section in wide]
    refused = {dtype for strategy in chosen for dtype in getattr(strategy, "REFUSES", {})}
    return "float32" if "float64" in refused else "float64"


def fold(config: Config, mesh: Mesh, device: torch.device, start: Program | None = None) -> Program:
    """The finished program of this rank. A `start` has another model, cut along inner axes already."""
    program, planned = start or unsharded(config, mesh, device), plan(config)
    for inner in (p for p in planned if p.strategy.AXIS != "dp" and start is None):
        program = inner.strategy.apply(program, mesh, inner.options)
    recompute(program.model, config.train.recompute)
    for outer in (p for p in planned if p.strategy.AXIS == "dp"):
        program = outer.strategy.apply(program, mesh, outer.options)
    if any(p.is_meta for p in program.parameters.values()):
        program = replace(program, parameters=materialise(program))
    return program


def layouts(config: Config) -> list[dict[str, Layout]]:
    """Where each rank's pieces of the parameters lie: the plan folded on paper, over a model without values."""
    model = build(config.model, config.train.dtype)
    values = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    ranks = []
    for rank in range(config.mesh.world):
        mesh = Mesh(config.mesh.degrees, rank)
        program = replace(unsharded(config, mesh, torch.device("meta")), initial=values.__getitem__)
        for planned in plan(config):
            program = planned.strategy.apply(program, mesh, planned.options)
        ranks.append({name: program.layout[name] for name in program.parameters})
    return ranks


def predict(config: Config) -> list[Prediction]:
    """What each rank will send in a step and hold after it: the plan folded on paper, over a model without values."""
    ranks, planned = [], plan(config)
    cuts = any(p.strategy.AXIS != "dp" for p in planned)  # these cut the model, for those after them
    for rank in range(config.mesh.world):
        mesh = Mesh(config.mesh.degrees, rank)
        if cuts or not rank:
            model = build(config.model, config.train.dtype)
        parts = [p.strategy.predict(model, mesh, p.options, config) for p in planned]
        traffic: dict[str, float] = defaultdict(float)
        least: dict[str, float] = {}
        memory: dict[str, int] = {} if parts else _unsharded(config, model)
        for part in parts:
            memory.update(part.memory)
            least.update(part.least)
            for key, value in part.traffic.items():
                traffic[key] += value
        sent = {key: round(value) for key, value in traffic.items() if value}
        ranks.append(Prediction(sent, memory, {key: round(value) for key, value in least.items()}))
    return ranks


def _unsharded(config: Config, model: nn.Module) -> dict[str, int]:
    whole = bytes_of(model.parameters())
    return {"parameters": whole, "gradients": whole, "optimizer": state_copies(config.train) * whole}


def _resolve(config: Config) -> Iterator[tuple[Planned, bool]]:
    for axis in FOLD:
        section = getattr(config.mesh, axis)
        if axis != "dp" and section.degree == 1 and not (section.strategy or section.options):
            continue
        path = f"mesh.{axis}"
        active = section.degree > 1 or (axis == "dp" and config.mesh.cp.degree > 1)
        try:
            strategy = find(config.engine, section.strategy or USUAL[axis])
        except UnsupportedError:
            if not active:
                continue
            raise
        except ConfigError as error:
            raise ConfigError(f"{path}.strategy: {error}" if "strategy" in str(error) else str(error)) from None
        if axis != strategy.AXIS:
            raise ConfigError(
                f"{path}.strategy: {section.strategy} belongs to mesh.{strategy.AXIS}. "
                f"Set {path}.strategy: {USUAL[axis]}."
            )
        options = check(strategy.Options, section.options, prefix=path, also=type(section).model_fields)
        if hasattr(strategy, "check") and section.degree > 1:
            strategy.check(config, options)
        yield Planned(strategy, options), active


def _package(engine: str) -> str:
    return "sandbox.strategies" if engine == "native" else f"sandbox.engines.{engine}"


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1, 0.4)
    return f"Did you mean {near[0]}?" if near else f"There are: {', '.join(names)}."
