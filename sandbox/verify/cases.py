"""Small trainings that hide nothing, and cases made of them: what the matrix, planted bugs and tests share."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from sandbox.config import Config, Data, Mesh, Model, Train
from sandbox.errors import ConfigError
from sandbox.plan import find, finest, plan
from sandbox.verify.verifier import Case, fixture

__all__ = [
    "DATA", "EVEN", "EVEN_EXPERTS", "EVERY", "EXPERTS", "FULL", "MANY", "MANY_TIED", "MODEL", "SWITCH", "TIED", "TRAIN",
    "alone", "case", "first", "possible",
]  # fmt: skip

MODEL = Model(
    layers=2, width=24, heads=4, kv_heads=2, hidden=37, norm="layer", mlp="gelu", bias=True, qk_norm=True, dropout=0.1
)
EVEN = MODEL.model_copy(update={"hidden": 36})  # for libraries that cut into equal parts only
MANY = MODEL.model_copy(update={"width": 48, "heads": 12, "kv_heads": 12})  # heads that divide
TIED = Model(layers=2, width=24, heads=4, kv_heads=1, tied=True, vocab_multiple=8)
MANY_TIED = MANY.model_copy(update={"tied": True})
EXPERTS = Model(
    layers=2, width=24, heads=4, kv_heads=2, hidden=19, bias=True, dropout=0.1, experts=5, aux_loss=0.3, z_loss=0.05
)  # five experts divide over no world
EVEN_EXPERTS = EXPERTS.model_copy(update={"hidden": 20})
EVERY = EXPERTS.model_copy(update={"top_k": EXPERTS.experts})
SWITCH = TIED.model_copy(update={"experts": 4, "top_k": 1, "renormalise": False, "moe_every": 2})
DATA = Data(sequence=24)
TRAIN = Train(batch=26, microbatches=3, clip=0.5)  # 26 = 8 x 3 + 2: rows divide over no world
FULL = {"recompute": "full"}


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
    if axis == "ep":  # it is carved out of dp, and wants experts
        mesh = {"dp": {"degree": degree}, **mesh}
        settings.setdefault("model", EXPERTS)
    return case(engine, name, mesh, **settings)


def case(
    engine: str,
    name: str,
    mesh: dict[str, dict[str, Any]],
    *,
    model: Model = MODEL,
    data: Data = DATA,
    train: dict[str, Any] | None = None,
    dtype: str | None = None,
    optimizer: str = "sgd_momentum",
    bucket_mb: float = 0.04,
) -> Case:
    """One small case of any mesh: axis -> degree, strategy, options. Buckets are small, so that there are several.

    `dtype` None is the widest that the strategies can compute in.
    """
    sections = Mesh.model_validate(mesh)
    if "dp" in mesh and "bucket_mb" in find(engine, sections.dp.strategy).Options.model_fields:
        sections = Mesh.model_validate(mesh | {"dp": {"bucket_mb": bucket_mb} | mesh["dp"]})
    train_ = TRAIN.model_copy(update=train or {})
    config = Config(name=name, engine=engine, mesh=sections, model=model, data=data, train=train_)
    return Case(fixture(config, dtype or finest(config), optimizer))


def first(*attempts: Callable[[], Case]) -> Iterator[Case]:
    """The first that is possible, if any is; those after it are not made."""
    return islice(filter(possible, (attempt() for attempt in attempts)), 1)


def possible(case: Case) -> bool:
    """Whether there is such a plan, and the engine can run it."""
    try:
        plan(case.config)
    except ConfigError:
        return False
    return True
