"""Any model on any mesh trains as one process does, or is refused before it starts by a message that helps.

It helps if what it advises is accepted, perhaps after a few more refusals: where that leads to is then run.

25 draws a chunk, each chunk with its own seed: `pytest tests/thorough/test_any_plan.py --draws 200` draws eight chunks.
A draw that fails prints the command that repeats it; one over short documents repeats while pytest keeps its folder.
"""

import json
import random
import shlex
import types
import typing
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import checkpoint_work
import pytest
import torch
import world
import yaml
from advice import advised, changed
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from sandbox import program
from sandbox.config import Config, check, load
from sandbox.errors import ConfigError, UnsupportedError
from sandbox.interchange.keys import leaves
from sandbox.mesh import Mesh
from sandbox.model import build
from sandbox.plan import find, fold, plan, strategies
from sandbox.verify import Case, fixture

CHUNK = 25
ENGINES = ("native", "native", "native", "torch")
AXES = ("pp", "dp", "cp", "tp")
DEGREES = [degrees for degrees in product(range(1, 9), repeat=len(AXES)) if 1 < prod(degrees) <= 8]
DEGREES += 5 * [degrees for degrees in DEGREES if degrees.count(2) == 3]  # or three axes at once would be rare
DEGREES += [degrees for degrees in product((1, 2, 3), repeat=len(AXES)) if prod(degrees) == 12]
PLAIN = Path(__file__).parents[2] / "configs" / "unsharded.yaml"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chunk" in metafunc.fixturenames:
        metafunc.parametrize("chunk", range(-(-metafunc.config.option.draws // CHUNK)))


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Of an option, by its type."""
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) in (types.UnionType, typing.Union):
        return st.one_of(*(values(part) for part in get_args(annotation)))
    kinds = {bool: st.booleans(), int: st.integers(1, 3), float: st.sampled_from([0.001, 0.01, 25.0])}
    return kinds.get(annotation, st.none())


def section(engine: str, name: str, degree: int) -> st.SearchStrategy[dict[str, Any]]:
    """A section of the mesh: any strategy of the axis with any of its options."""
    names = [found for found in strategies(engine) if name == find(engine, found).AXIS]

    def options(strategy: str) -> st.SearchStrategy[dict[str, Any]]:
        fields = find(engine, strategy).Options.model_fields
        chosen = {option: values(field.annotation) for option, field in fields.items()}
        replicas = {"replicas": st.sampled_from([1, 1, 2, 3])} if name == "dp" else {}
        return st.fixed_dictionaries(
            {"degree": st.just(degree), "strategy": st.just(strategy)}, optional={**chosen, **replicas}
        )

    return st.sampled_from(names).flatmap(options)


MODEL = {
    "layers": st.sampled_from([1, 2, 3, 4, 5, 6, 6, 10]),
    "kv_heads": st.sampled_from([1, 1, 2, 2, 3, 4]),
    "hidden": st.sampled_from([3, 11, 16, 20]),
    "norm": st.sampled_from(["rms", "layer"]),
    "mlp": st.sampled_from(["swiglu", "gelu"]),
    "vocab_multiple": st.sampled_from([1, 7, 64]),
    "dropout": st.sampled_from([0.0, 0.2]),
    **dict.fromkeys(("bias", "tied", "rotary", "qk_norm"), st.booleans()),
}
EXPERTS = {
    "experts": st.integers(2, 5),
    "top_k": st.integers(1, 3),
    "moe_every": st.integers(1, 2),
    "aux_loss": st.sampled_from([0.0, 0.3]),
    "z_loss": st.sampled_from([0.0, 0.05]),
    "renormalise": st.booleans(),
}
DATA = {"sequence": st.integers(2, 20), "layout": st.sampled_from(["packed", "padded"])}
TRAIN = {
    "batch": st.sampled_from([2, 7, 13, 16, 24, 25, 37]),
    "microbatches": st.integers(1, 5),
    "clip": st.sampled_from([None, 0.1]),
    "seed": st.integers(0, 9),
    "recompute": st.sampled_from(["none", "selective", "full"]),
}
DTYPES = st.sampled_from(["float64"] * 3 + ["bfloat16"])


@st.composite
def meshes(draw: st.DrawFn, engine: str, *, experts: bool) -> dict[str, Any]:
    """Any mesh of an engine's; of native, perhaps with experts cut over some of dp."""
    has = {find(engine, name).AXIS for name in strategies(engine)}
    fits = [d for d in DEGREES if all(n == 1 or axis in has for n, axis in zip(d, AXES, strict=True))]
    degrees = dict(zip(AXES, draw(st.sampled_from(fits)), strict=True))
    mesh = {name: draw(section(engine, name, degree)) for name, degree in degrees.items() if degree > 1}
    if experts and "ep" in has and (cuts := [n for n in (2, 3, 4) if degrees["dp"] % n == 0]):
        mesh |= draw(st.sampled_from([{}, *({"ep": {"degree": n}} for n in cuts)]))
    return mesh


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Any model."""
    heads, width = draw(st.sampled_from([2, 4, 4, 6, 8])), draw(st.sampled_from([4, 4, 4, 5, 6]))
    model = {"heads": heads, "width": heads * width, **draw(st.fixed_dictionaries({}, optional=MODEL))}
    return model | draw(st.one_of(st.just({}), st.just({}), st.fixed_dictionaries(EXPERTS)))


@st.composite
def trees(draw: st.DrawFn, files: tuple[Path, ...], engines: Sequence[str] = ("native",)) -> dict[str, Any]:
    """A config as one would write it."""
    engine, model, dtype = draw(st.sampled_from(engines)), draw(models()), draw(DTYPES)
    mesh = draw(meshes(engine, experts="experts" in model))
    if "tp" in mesh:
        dtype = "float64"  # what bfloat16 loses where features add up in parts is more than the reference measures
    if dtype == "bfloat16" and "experts" in model:
        model["top_k"] = model["experts"]  # or two right runs may send a token to different ones
    return {
        "engine": engine,
        "mesh": mesh,
        "model": model,
        "data": {**draw(st.fixed_dictionaries(DATA)), "files": draw(st.sampled_from([(), files]))},
        "train": {"dtype": dtype, **draw(st.fixed_dictionaries({}, optional=TRAIN))},
    }


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with a corpus of documents of all lengths, from 1 to beyond a row: many to a row of a batch."""
    folder = tmp_path_factory.mktemp("documents")
    for number in range(200):
        text = "".join(chr(97 + (number * place) % 26) for place in range(1 + number * 7 % 31))
        Path(folder / f"{number:03}.txt").write_text(text)
    config = folder / "documents.yaml"
    config.write_text(yaml.safe_dump({"data": {"files": sorted(map(str, folder.glob("*.txt")))}}))
    return config


DRAWN = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a plan takes a second: the first that fails is printed as it is
    suppress_health_check=list(HealthCheck),
)


def accepted(tree: dict[str, Any]) -> Config | None:
    """The config, if it is not refused."""
    try:
        config = check(Config, tree)
        plan(config)
    except (ConfigError, UnsupportedError):
        return None
    return config


def allowed(tree: dict[str, Any], choose: random.Random) -> tuple[Config, list[str]]:
    """The config, or the one to which the advice of refusals leads; and what the refusals on the way said."""
    said: list[str] = []
    while len(said) < 10:
        try:
            config = check(Config, tree)
            plan(config)
        except (ConfigError, UnsupportedError) as error:
            said.append(str(error))
            advice = advised(said[-1])
            assert advice, f"no advice: {error}"
            tree = changed(tree, choose.choice(advice))
        else:
            return config, said
    raise AssertionError("each piece of advice led to another refusal:\n" + "\n".join(said))


def command(config: Config, base: Path) -> str:
    """What verifies `config`, which is a fixture, again: a config, and all in which its fixture is another."""
    other = dict(leaves(fixture(load(base), config.train.dtype).model_dump(mode="json")))
    words = ["sandbox", "verify", str(base), "--dtype", config.train.dtype]
    for path, value in leaves(config.model_dump(mode="json", exclude={"name"})):
        if (path, value) not in other.items():
            words += ["--set", f"{path}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def note(config: Config) -> None:
    """Count what was drawn, for --hypothesis-show-statistics."""
    event(f"world {config.mesh.world}")
    for path, value in leaves(config.model_dump(mode="json", exclude={"data", "run"})):
        if path.endswith((".strategy", ".schedule", ".kind", ".sequence", ".recompute", ".microbatches", ".dtype")):
            event(f"{path} {value}")


@pytest.mark.parity
@pytest.mark.timeout(900)
def test_any_plan_holds_or_is_refused_until_it_does(chunk: int, short_documents: Path) -> None:
    @seed(chunk)
    @settings(DRAWN, max_examples=CHUNK)
    @given(trees(load(short_documents).data.files, ENGINES), st.randoms(use_true_random=False))
    def holds(tree: dict[str, Any], choose: random.Random) -> None:
        given, said = allowed(tree, choose)
        config = fixture(given, None)
        event(f"{len(said)} refusals")
        note(config)
        verdict = world.verifier().verify(Case(config))
        again = command(config, short_documents if config.data.files else PLAIN)
        assert verdict.status == "held", f"{verdict.status}: {verdict.cause}\n{again}"

    holds()


@pytest.mark.unit
def test_a_draw_is_repeated_by_the_command_that_is_printed(short_documents: Path) -> None:
    @settings(DRAWN, max_examples=40, derandomize=True)
    @given(trees(load(short_documents).data.files, ENGINES), st.randoms(use_true_random=False))
    def repeated(tree: dict[str, Any], choose: random.Random) -> None:
        given, _ = allowed(tree, choose)
        config = fixture(given, None)
        base = short_documents if config.data.files else PLAIN
        sandbox, verify, path, option, dtype, *rest = shlex.split(command(config, base))
        assert (sandbox, verify, option, rest[::2]) == ("sandbox", "verify", "--dtype", ["--set"] * len(rest[::2]))
        again = fixture(load(Path(path), rest[1::2]), dtype)
        assert again.model_copy(update={"name": config.name}) == config

    repeated()


@st.composite
def journeys(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One training in three plans, one after the other."""
    model = draw(models())
    if model.get("bias"):
        model["rotary"] = True  # or the gradients of keys' biases are noise
    data, seed_ = draw(st.fixed_dictionaries(DATA)), draw(st.integers(0, 9))
    plans = []
    for _ in range(3):
        engine = draw(st.sampled_from(ENGINES))
        train = {name: draw(TRAIN[name]) for name in ("microbatches", "recompute")}
        plans.append(
            {
                "engine": engine,
                "mesh": draw(meshes(engine, experts="experts" in model)),
                "model": model,
                "data": data,
                "train": {"batch": 37, "seed": seed_, "clip": 0.1, **train},
            }
        )
    return plans


@pytest.mark.parity
@pytest.mark.timeout(900)
def test_a_training_goes_on_from_plan_to_plan(chunk: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    @seed(chunk)
    @settings(DRAWN, max_examples=CHUNK)
    @given(journeys())
    def goes_on(plans: list[dict[str, Any]]) -> None:
        configs = [fixture(config) for tree in plans if (config := accepted(tree)) is not None]
        if len(configs) > 1:
            event(f"{len(configs)} plans")
            errors = checkpoint_work.relay_of(configs, tmp_path_factory.mktemp("journey"))
            assert max(errors) <= world.EXACT, f"{errors}\n{yaml.safe_dump_all(plans)}"

    goes_on()


def counted(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """The squared norm of a made-up gradient: as all ranks add it up, on paper, and of the whole tensors."""
    added: list[float] = []

    def sum_on_paper(square: Tensor, *_: object) -> types.SimpleNamespace:
        added.append(square.item())
        return types.SimpleNamespace(wait=lambda: square)

    monkeypatch.setattr(program, "all_reduce", sum_on_paper)
    shapes = {name: p.shape for name, p in build(config.model, "float64").named_parameters()}
    whole = {name: torch.rand(shape, dtype=torch.float64) for name, shape in shapes.items()}
    expected = sum(value.square().sum().item() for value in whole.values())
    for rank in range(config.mesh.world):
        made = fold(config, Mesh(config.mesh.degrees, rank), torch.device("cpu"))
        for name, param in made.parameters.items():
            param.grad = made.layout[name].take(whole[name]).clone()
        alone = made.clip(made, None).item() ** 2
        if not added:  # each rank has all of it, and asks nobody
            return alone, expected
    return sum(added), expected


@pytest.mark.unit
@given(trees(()), st.randoms(use_true_random=False))
@settings(DRAWN, max_examples=20, derandomize=True)
def test_the_norm_counts_every_element_once(tree: dict[str, Any], choose: random.Random) -> None:
    config, _ = allowed(tree, choose)
    with pytest.MonkeyPatch.context() as monkeypatch:
        found, expected = counted(fixture(config), monkeypatch)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.unit
@pytest.mark.parametrize("blind", ["copy", "sharded"])
def test_a_norm_that_counts_copies_is_seen(blind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another rank along tp or pp holds as well (keys and values, the tied weight, norms) would count twice."""
    mesh = {"pp": {"degree": 2}, "tp": {"degree": 2}}
    config = fixture(check(Config, {"mesh": mesh, "model": {"kv_heads": 1, "tied": True}}))
    found, expected = counted(config, monkeypatch)
    assert found == pytest.approx(expected, rel=1e-12)
    counts = program._counts
    if blind == "copy":
        monkeypatch.setattr(program, "_counts", lambda layout, first: counts(replace(layout, copy=0), first))
    else:
        monkeypatch.setattr(program, "_counts", lambda layout, first: layout.copy == 0)
    found, expected = counted(config, monkeypatch)
    assert found > 1.001 * expected
