"""All cases that `verify --all` runs, made from what there is: every engine's every strategy, by every option.

A new strategy is in the matrix by its place in the folder, an option by its type: the other values of a choice or a
switch each make a case.
"""

from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from sandbox.config import Config, Data, Mesh, Model, Train
from sandbox.errors import ConfigError
from sandbox.plan import engines, find, plan, strategies
from sandbox.verify.verifier import Case, fixture

__all__ = ["DATA", "MODEL", "TIED", "TRAIN", "alone", "case", "matrix"]

WORLDS = (2, 3, 4, 8)
MODEL = Model(
    layers=2, width=24, heads=4, kv_heads=2, hidden=37, norm="layer", mlp="gelu", bias=True, qk_norm=True, dropout=0.1
)
TIED = Model(layers=2, width=24, heads=4, kv_heads=1, tied=True, vocab_multiple=8)
DATA = Data(sequence=24)
FULL = {"recompute": "full"}
TRAIN = Train(batch=26, microbatches=3, clip=0.5)  # 26 = 8 x 3 + 2: rows divide over no world


def matrix() -> Iterator[Case]:
    """Every case that is possible: strategies alone, by world, option, model and dtype; then compositions."""
    for case in chain(_alone(), _recomputed()):
        with suppress(ConfigError):  # a mesh that this model cannot be cut by
            plan(case.config)
            yield case


def _alone() -> Iterator[Case]:
    for engine in engines():
        for name in strategies(engine):
            strategy = find(engine, name)
            for world in WORLDS:
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
) -> Case:
    """One small case of any mesh: axis -> degree, strategy, options. Buckets are small, so that there are several."""
    sections = Mesh.model_validate(mesh)
    if "bucket_mb" in find(engine, sections.dp.strategy).Options.model_fields and "dp" in mesh:
        sections = Mesh.model_validate(mesh | {"dp": {"bucket_mb": 0.04} | mesh["dp"]})
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
