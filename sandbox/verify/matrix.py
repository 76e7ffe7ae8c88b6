"""All cases that `verify --all` runs, made from what there is: every engine's every strategy, by every option.

A new strategy is in the matrix by its place in the folder, an option by its type: the other values of a choice or a
switch each make a case.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from sandbox.config import Config, Data, Mesh, Model, Train
from sandbox.plan import engines, find, strategies
from sandbox.verify.verifier import Case, fixture

__all__ = ["DATA", "MODEL", "TRAIN", "case", "matrix"]

WORLDS = (2, 3, 4, 8)
MODEL = Model(
    layers=2, width=24, heads=4, kv_heads=2, hidden=37, norm="layer", mlp="gelu", bias=True, qk_norm=True, dropout=0.1
)
TIED = Model(layers=2, width=24, heads=4, kv_heads=1, tied=True, vocab_multiple=8)
DATA = Data(sequence=24)
TRAIN = Train(batch=26, microbatches=3, clip=0.5)  # 26 = 8 x 3 + 2: rows divide over no world


def matrix() -> Iterator[Case]:
    """Every case: strategies at all worlds, then their options, models and dtypes at a world where they show."""
    for engine in engines():
        for name in strategies(engine):
            for world in WORLDS:
                yield case(engine, name, world, "")
            for label, options in _variants(find(engine, name).Options.model_fields):
                yield case(engine, name, 3, label, options)
            yield case(engine, name, 4, "replicas 2", {"replicas": 2})
            yield case(engine, name, 4, "tied", model=TIED, data=Data(sequence=24, layout="padded"))
            yield case(engine, name, 2, "one microbatch, no clipping", train={"microbatches": 1, "clip": None})
            for dtype in ("float32", "bfloat16"):
                yield case(engine, name, 2, dtype, dtype=dtype)


def case(
    engine: str,
    strategy: str,
    world: int,
    label: str,
    options: dict[str, Any] | None = None,
    *,
    model: Model = MODEL,
    data: Data = DATA,
    train: dict[str, Any] | None = None,
    dtype: str = "float64",
) -> Case:
    """One small case: a strategy at a world, and what is special about it."""
    small = {"bucket_mb": 0.04} if "bucket_mb" in find(engine, strategy).Options.model_fields else {}
    axis = {"degree": world, "strategy": strategy, **small, **(options or {})}
    config = Config(
        name=f"{strategy}-dp{world}" + (f", {label}" if label else ""),
        engine=engine,
        mesh=Mesh.model_validate({"dp": axis}),
        model=model,
        data=data,
        train=TRAIN.model_copy(update=train or {}),
    )
    return Case(fixture(config, dtype))


def _variants(fields: dict[str, FieldInfo]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in fields.items():
        if get_origin(field.annotation) is Literal:
            others = [value for value in get_args(field.annotation) if value != field.default]
        else:
            others = [not field.default] if field.annotation is bool else []
        for value in others:
            yield f"{name} {str(value).lower()}", {name: value}
