"""All cases that `verify --all` runs, made from what there is: every engine's every strategy, by every option.

A new strategy is in the matrix by its place in the folder, an option by its type: the other values of a choice or a
switch each make a case.

Compositions are of the ways in which an axis can be used: dp by each of its strategies, any other axis by each value of
its strategy's first option (schedule, kind, sequence). Of two axes, every way of the one meets every way of the other;
of three, any two ways meet, over a third that changes from case to case; of four and five there are samples.
"""

from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations, product
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from sandbox.config import Config, Data, Mesh, Model, Train
from sandbox.errors import ConfigError
from sandbox.plan import USUAL, engines, find, plan, strategies
from sandbox.verify.verifier import Case, fixture

__all__ = ["AXES", "DATA", "MODEL", "TIED", "TRAIN", "Way", "alone", "case", "matrix", "ways"]

WORLDS = {"dp": (2, 3, 4, 8), "pp": (2, 3, 4), "cp": (2, 3, 4), "tp": (2, 3, 4)}
AXES = ("pp", "tp", "cp", "dp")
"""What is composed."""

MODEL = Model(
    layers=2, width=24, heads=4, kv_heads=2, hidden=37, norm="layer", mlp="gelu", bias=True, qk_norm=True, dropout=0.1
)
TIED = Model(layers=2, width=24, heads=4, kv_heads=1, tied=True, vocab_multiple=8)
DATA = Data(sequence=24)
FULL = {"recompute": "full"}
TRAIN = Train(batch=26, microbatches=3, clip=0.5)  # 26 = 8 x 3 + 2: rows divide over no world
# Compositions: fewer key/value heads than ranks along tp, and rows, columns and features that no degree divides.
SMALL = MODEL.model_copy(update={"width": 16, "kv_heads": 1, "hidden": 11})
SMALL_TIED = TIED.model_copy(update={"width": 16})
SHORT = Data(sequence=11)


class Way(NamedTuple):
    """How an axis is used in a composition: degree, strategy and options, and what to call them."""

    axis: str
    label: str
    settings: dict[str, Any]


HYBRID = {"dp": [Way("dp", "dp2x2 fsdp", {"degree": 4, "replicas": 2, "strategy": "fsdp"})]}


def matrix() -> Iterator[Case]:
    """Every case that is possible: strategies alone, by world, option, model and dtype; then compositions."""
    for case in (*_alone(), *_recomputed(), *_pairs(), *_triples(), *_more()):
        with suppress(ConfigError):  # a mesh that this model cannot be cut by
            plan(case.config)
            yield case


def _alone() -> Iterator[Case]:
    for engine in engines():
        for name in strategies(engine):
            strategy = find(engine, name)
            for world in WORLDS.get(strategy.AXIS, (2,)):
                yield alone(engine, name, world, "")
            for label, options in _variants(strategy.Options.model_fields):
                yield alone(engine, name, 3 if strategy.AXIS == "dp" else 2, label, options)
            if strategy.AXIS == "dp":
                yield alone(engine, name, 4, "replicas 2", {"replicas": 2})
            yield alone(engine, name, 4, "tied", model=TIED, data=Data(sequence=24, layout="padded"))
            yield alone(engine, name, 2, "one microbatch, no clipping", train={"microbatches": 1, "clip": None})
            for dtype in ("float32", "bfloat16"):
                yield alone(engine, name, 2, dtype, dtype=dtype)
            for how in ("selective", "full"):
                yield alone(engine, name, 2, f"recompute {how}", train={"recompute": how})


def _recomputed() -> Iterator[Case]:
    """Blocks that backward computes again, where axes meet: what is gathered, summed, passed on, or put off."""
    mesh: dict[str, dict[str, Any]]
    shard, two = {"degree": 2, "strategy": "zero3"}, {"degree": 2}
    for sequence, dropout in ((True, 0.1), (True, 0.0), (False, 0.0)):
        model = MODEL.model_copy(update={"dropout": dropout})
        name = f"recompute-tp2 x dp2{', sequence' if sequence else ''}, dropout {dropout}"
        mesh = {"tp": {"degree": 2, "sequence": sequence}, "dp": {"degree": 2, "strategy": "fsdp"}}
        yield case("native", name, mesh, model=model, train=FULL)
    for schedule in ("zb_h1", "zbv", "dualpipe_v"):
        mesh = {"pp": {"degree": 2, "schedule": schedule}, "dp": shard}
        yield case("native", f"recompute-pp2 x dp2, {schedule}", mesh, train=FULL)
        yield case("native", f"recompute-pp2 x dp2, {schedule}, bfloat16", mesh, train=FULL, dtype="bfloat16")
    for kind in ("ring", "gather", "ulysses"):
        for how in ("selective", "full"):
            mesh = {"cp": {"degree": 2, "kind": kind}, "tp": {"degree": 2, "sequence": True}}
            yield case("native", f"recompute-cp2 x tp2, {kind}, {how}", mesh, train={"recompute": how})
    for how in ("selective", "full"):
        mesh = {"pp": {"degree": 2, "schedule": "zb_h1"}, "dp": shard, "cp": two, "tp": two}
        yield case("native", f"recompute-pp2 x dp2 x cp2 x tp2, {how}", mesh, train={"recompute": how})
    for dtype in ("float64", "bfloat16"):  # several ranks hold the same keys and values
        mesh = {"tp": {"degree": 4}, "dp": shard}
        yield case("native", f"recompute-tp4 x dp2, {dtype}", mesh, train={"recompute": "selective"}, dtype=dtype)


def ways(axis: str) -> list[Way]:
    """All that a composition can do with an axis, on two ranks."""
    if axis == "dp":
        names = [name for name in strategies("native") if axis == find("native", name).AXIS]
        return [Way(axis, f"dp2 {name}", {"degree": 2, "strategy": name}) for name in names]
    option, field = next(iter(find("native", USUAL[axis]).Options.model_fields.items()))
    if get_origin(field.annotation) is Literal:
        said = {str(value): value for value in get_args(field.annotation)}
    else:
        said = {"": False, option: True}
    return [Way(axis, f"{axis}2 {text}".strip(), {"degree": 2, option: value}) for text, value in said.items()]


def _pairs() -> Iterator[Case]:
    for axes in combinations(AXES, 2):
        for (i, one), (j, two) in product(*(enumerate((*ways(axis), *HYBRID.get(axis, ()))) for axis in axes)):
            yield _composed(one, two, tied=(i + j) % 2 == 1, microbatches=3)


def _triples() -> Iterator[Case]:
    """The third of three axes takes turns, so that each of its ways meets each of the others'."""
    for axes in combinations(AXES, 3):
        *two, third = sorted(map(ways, axes), key=len, reverse=True)
        for (i, a), (j, b) in product(*map(enumerate, two)):
            yield _composed(a, b, third[(i + j) % len(third)], tied=i % 2 == 1)


def _more() -> Iterator[Case]:
    """All four axes, by every schedule; and replicas as one axis more."""
    pp, tp, cp, dp = map(ways, AXES)
    for number, schedule in enumerate(pp):
        others = (some[number % len(some)] for some in (tp, cp, dp))
        yield _composed(schedule, *others, tied=number % 2 == 1)
    (hybrid,) = HYBRID["dp"]
    yield from (_composed(*two, hybrid) for two in combinations((pp[1], tp[1], cp[0]), 2))
    yield from (_composed(pp[2 * n + 1], tp[n % len(tp)], kind, hybrid) for n, kind in enumerate(cp))


def _composed(*chosen: Way, tied: bool = False, microbatches: int = 2) -> Case:
    chosen = tuple(sorted(chosen, key=lambda way: AXES.index(way.axis)))
    name = ", ".join(way.label for way in chosen) + (", tied" if tied else "")
    mesh, model = {way.axis: way.settings for way in chosen}, SMALL_TIED if tied else SMALL
    train = {"batch": 4 * microbatches + 1, "microbatches": microbatches}
    return case("native", name, mesh, model=model, data=SHORT, train=train, bucket_mb=0.004)


def alone(
    engine: str,
    strategy: str,
    degree: int,
    label: str,
    options: dict[str, Any] | None = None,
    beside: dict[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> Case:
    """One small case of a strategy by itself, or `beside` other axes, and what is special about it."""
    axis = find(engine, strategy).AXIS
    name = f"{strategy}-{axis}{degree}" + (f", {label}" if label else "")
    mesh = {axis: {"degree": degree, "strategy": strategy, **(options or {})}, **(beside or {})}
    return case(engine, name, mesh, **settings)


def case(
    engine: str,
    name: str,
    mesh: dict[str, dict[str, Any]],
    *,
    model: Model = MODEL,
    data: Data = DATA,
    train: dict[str, Any] | None = None,
    dtype: str = "float64",
    bucket_mb: float = 0.04,
) -> Case:
    """One small case of any mesh: axis -> degree, strategy, options. Buckets are small, so that there are several."""
    sections = Mesh.model_validate(mesh)
    if "bucket_mb" in find(engine, sections.dp.strategy).Options.model_fields and "dp" in mesh:
        sections = Mesh.model_validate(mesh | {"dp": {"bucket_mb": bucket_mb} | mesh["dp"]})
    train_ = TRAIN.model_copy(update=train or {})
    return Case(fixture(Config(name=name, engine=engine, mesh=sections, model=model, data=data, train=train_), dtype))


def _variants(fields: dict[str, FieldInfo]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in fields.items():
        if get_origin(field.annotation) is Literal:
            others = [value for value in get_args(field.annotation) if value != field.default]
        else:
            others = [not field.default] if field.annotation is bool else []
        for value in others:
            yield f"{name} {str(value).lower()}", {name: value}
