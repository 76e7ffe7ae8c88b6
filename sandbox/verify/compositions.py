"""Cases of several axes at once.

Compositions are of the ways in which an axis can be used: dp by each of its strategies, any other axis by each value of
its strategy's first option (schedule, kind, sequence). Of two axes, every way of the one meets every way of the other;
of three, any two ways meet, over a third that changes from case to case; of four and five there are samples.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain, combinations, product
from typing import Any, Literal, NamedTuple, get_args, get_origin

from sandbox.config import Data
from sandbox.plan import USUAL, engines, find, strategies
from sandbox.verify.cases import EVEN, EVERY, FULL, MANY, MANY_TIED, MODEL, TIED, alone, case, first
from sandbox.verify.verifier import Case

__all__ = ["AXES", "Way", "compositions", "ways"]

AXES = ("pp", "tp", "cp", "dp")
"""What is composed. Experts, which are carved out of dp, are put beside every strategy instead."""

# Fewer key/value heads than ranks along tp, and rows, columns and features that no degree divides.
SMALL = MODEL.model_copy(update={"width": 16, "kv_heads": 1, "hidden": 11})
SMALL_TIED = TIED.model_copy(update={"width": 16})
SHORT = Data(sequence=11)


class Way(NamedTuple):
    """How an axis is used in a composition: degree, strategy and options, and what to call them."""

    axis: str
    label: str
    settings: dict[str, Any]


HYBRID = {"dp": [Way("dp", "dp2x2 fsdp", {"degree": 4, "replicas": 2, "strategy": "fsdp"})]}


def compositions() -> Iterator[Case]:
    """All of them, possible or not."""
    yield from chain(_pairs(), _triples(), _more(), _recomputed(), _experts(), _of_other_engines())


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


def _experts() -> Iterator[Case]:
    """Experts cut over ep, beside every strategy of every other axis."""
    for name in strategies("native"):
        axis = find("native", name).AXIS
        if axis != "ep":
            section = {"degree": 4 if axis == "dp" else 2, "strategy": name}
            yield alone("native", "expert", 2, f"beside {name}", beside={axis: section})
    yield alone("native", "expert", 2, "replicas 2", beside={"dp": {"degree": 8, "replicas": 2, "strategy": "fsdp"}})
    yield alone("native", "expert", 2, "beside sequence", beside={"tp": {"degree": 2, "sequence": True}})
    for beside in ({"cp": {"degree": 2}}, {"tp": {"degree": 2, "sequence": True}}, {"pp": {"degree": 2}}):
        name = f"recompute full, {next(iter(beside))}"
        yield alone("native", "expert", 2, name, beside=beside, model=EVERY, train=FULL)
    yield from _experts_among()


def _experts_among() -> Iterator[Case]:
    """Experts cut over ep, among two axes and more."""
    two, sequence, ulysses = {"degree": 2}, {"degree": 2, "sequence": True}, {"degree": 2, "kind": "ulysses"}
    zero2, fsdp, replicas = (
        {"degree": degree, "strategy": name, "replicas": number}
        for degree, name, number in ((2, "zero2", 1), (4, "fsdp", 1), (4, "zero3", 2))
    )
    pp = {name: {"degree": 2, "schedule": name} for name in ("zbv", "zb_h1", "interleaved", "1f1b")}
    make, even = partial(alone, "native", "expert", 2), {"microbatches": 4}
    yield make("zbv, dp4 fsdp, tp2 sequence", beside={"pp": pp["zbv"], "dp": fsdp, "tp": sequence})
    name = "zb_h1, dp2 zero2, cp2 ulysses, recompute full"
    yield make(name, beside={"pp": pp["zb_h1"], "dp": zero2, "cp": ulysses}, train=FULL)
    yield make("interleaved, dp2x2 zero3", beside={"pp": pp["interleaved"], "dp": replicas}, train=even)
    yield make("cp2, tp2", beside={"cp": two, "tp": two})
    yield make("1f1b, dp2 zero2, cp2, tp2", beside={"pp": pp["1f1b"], "dp": zero2, "cp": two, "tp": two})


def _of_other_engines() -> Iterator[Case]:
    """Each two axes, dp by each of its strategies; replicas; and three axes at once."""
    for engine in engines()[1:]:
        axes = {name: find(engine, name).AXIS for name in strategies(engine)}
        others = [name for name, axis in axes.items() if axis != "dp"]
        for name, beside in (*product(others, [n for n in axes if axes[n] == "dp"]), *combinations(others, 2)):
            section: dict[str, dict[str, Any]] = {axes[beside]: {"degree": 2, "strategy": beside}}
            make = partial(alone, engine, name, 2, f"{beside}-{axes[beside]}2", beside=section)
            yield from first(make, partial(make, model=EVEN), partial(make, model=MANY))
        if {"tensor", "fsdp"} <= set(axes):
            hybrid = {"dp": {"degree": 4, "replicas": 2, "strategy": "fsdp"}}
            yield alone(engine, "tensor", 2, "fsdp-dp2x2, tied", beside=hybrid, model=MANY_TIED)
        if {"pipeline", "tensor", "fsdp"} <= set(axes):
            three: dict[str, dict[str, Any]] = {
                "dp": {"degree": 2, "strategy": "fsdp"},
                "tp": {"degree": 2, "sequence": True},
            }
            yield alone(engine, "pipeline", 2, "fsdp-dp2, tensor-tp2", beside=three)
        if {"context", "tensor", "zero2"} <= set(axes):
            zero: dict[str, dict[str, Any]] = {"dp": {"degree": 2, "strategy": "zero2"}, "tp": {"degree": 2}}
            yield alone(engine, "context", 2, "zero2-dp2, tensor-tp2", beside=zero, model=MANY)
