"""All cases that `verify --all` runs, made from what there is: every engine's every strategy, by every option.

A new strategy is in the matrix by its place in the folder, an option by its type: the other values of a choice or a
switch each make a case. Where a training does not suit a mesh (heads that do not divide), another takes its place.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from sandbox.config import Data
from sandbox.plan import engines, find, finest, required, strategies
from sandbox.verify.cases import (
    EVEN,
    EVEN_EXPERTS,
    EVERY,
    EXPERTS,
    MANY,
    MANY_TIED,
    SWITCH,
    TIED,
    alone,
    first,
    possible,
)  # fmt: skip
from sandbox.verify.compositions import compositions
from sandbox.verify.verifier import Case

__all__ = ["matrix"]

FOUR = {"microbatches": 4}


def matrix() -> Iterator[Case]:
    """Every case that is possible: strategies alone, by world, option, model and dtype; then compositions."""
    for engine in engines():
        for name in strategies(engine):
            yield from _alone(engine, name)
    yield from filter(possible, compositions())


def _alone(engine: str, name: str) -> Iterator[Case]:
    strategy, make = find(engine, name), partial(alone, engine, name)
    data, experts = strategy.AXIS == "dp", strategy.AXIS == "ep"
    library = bool(required(engine))
    worlds = (2, 3, 4, 8) if data else (2, 3, 4)
    for world in (2, 4) if library else worlds:
        case = partial(make, world)
        yield from first(
            partial(case, ""),
            partial(case, "many heads", model=MANY),
            partial(case, "even", model=EVEN),
            partial(case, "four microbatches", train=FOUR),
        )
    for label, options in _variants(strategy.Options.model_fields):
        case = partial(make, 3 if data else 2, label, options)
        yield from first(case, partial(case, train=FOUR))
    if data:
        yield from first(partial(make, 4, "replicas 2", {"replicas": 2}))
    case = partial(make, 4, "tied", data=Data(sequence=24, layout="padded"))
    models = (SWITCH,) if experts else (TIED, MANY_TIED)
    yield from first(*(partial(case, model=model) for model in models), partial(case, model=TIED, train=FOUR))
    yield from first(partial(make, 2, "one microbatch, no clipping", train={"microbatches": 1, "clip": None}))
    # where two right runs send a token to different experts, their gradients have nothing in common
    smooth: dict[str, Any] = {"model": EVERY} if experts else {}
    for dtype in ("float32", "bfloat16"):
        if not library or finest(make(2, "").config) != dtype:
            yield from first(partial(make, 2, dtype, dtype=dtype, **smooth))
    if data and not library:
        yield from first(partial(make, 2, "adamw", optimizer="adamw"))
    if "offload" in strategy.Options.model_fields:  # with which DeepSpeed has an AdamW of its own
        yield from first(partial(make, 2, "offload, adamw", {"offload": True}, optimizer="adamw"))
    for how in ("full",) if library else ("selective", "full"):
        yield from first(partial(make, 2, f"recompute {how}", train={"recompute": how}))
    if not experts:
        yield from first(*(partial(make, 2, "experts", model=model) for model in (EXPERTS, EVEN_EXPERTS)))


def _variants(fields: dict[str, FieldInfo]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in fields.items():
        if get_origin(field.annotation) is Literal:
            others = [value for value in get_args(field.annotation) if value != field.default]
        else:
            others = [not field.default] if field.annotation is bool else []
        for value in others:
            yield f"{name} {str(value).lower()}", {name: value}
