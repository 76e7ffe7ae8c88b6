"""Everything that `sandbox verify --all` runs: gradients, parameters, norms, bytes sent and bytes held."""

from collections import Counter
from itertools import combinations, product
from typing import Any

import pytest
import world

from sandbox.plan import engines, find, name_of, plan, required, strategies
from sandbox.verify import Case, Verdict, matrix
from sandbox.verify.compositions import AXES, Way, ways

CASES = list(matrix())
FIRST = {(case.config.engine, case.config.mesh.dp.strategy): case for case in reversed(CASES)}
"""Of each strategy of the data axis, under each engine, its simplest case."""


def name(case: Case) -> str:
    return f"{case.config.engine} {case.config.name}"


def marked(case: Case) -> Any:
    engines = [pytest.mark.engines] if required(case.config.engine) else []
    composed = [pytest.mark.compositions] if len(plan(case.config)) > 1 and case.config.mesh.world > 3 else []
    compiles = case.config.train.optimizer == "adamw" and any(hasattr(p.strategy, "ahead") for p in plan(case.config))
    slow = [pytest.mark.timeout(900)] if compiles else []  # the first of them
    return pytest.param(case, id=name(case), marks=engines + composed + slow)


@pytest.mark.parity
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_case_holds(case: Case) -> None:
    verdict = world.verifier().verify(case)
    assert verdict.status == "held", verdict.cause
    assert_close(case, verdict)
    assert_bytes_are_as_predicted(case, verdict)


def assert_close(case: Case, verdict: Verdict) -> None:
    adamw = case.config.train.optimizer == "adamw"
    assert len(verdict.gradients) == len(verdict.reported if adamw else verdict.parameters) > 10
    assert not (verdict.parameters if adamw else verdict.reported)
    assert len(verdict.losses) == (1 if adamw else 3)
    errors = [max(d.error, d.drift) for d in (*verdict.gradients, *verdict.parameters)]
    bound = world.EXACT if case.config.train.dtype == "float64" else verdict.tolerance
    assert max(*errors, verdict.loss, verdict.norm) <= bound
    if case.config.train.dtype == "float64":
        assert verdict.tolerance == world.EXACT
    else:
        assert 0 < verdict.tolerance < {"float32": 1e-2, "bfloat16": 0.3}[case.config.train.dtype]


def assert_bytes_are_as_predicted(case: Case, verdict: Verdict) -> None:
    assert verdict.traffic
    assert set(verdict.memory) == {"parameters", "gradients", "optimizer"}
    assert {key for key, amount in verdict.traffic.items() if amount.least} <= {"all_to_all ep"}
    for amount in (*verdict.traffic.values(), *verdict.memory.values()):
        least = amount.least or amount.predicted
        assert all(low <= n <= high for low, n, high in zip(least, amount.measured, amount.predicted, strict=True))
        assert len(amount.measured) == case.config.mesh.world
        assert sum(amount.measured) > 0 or amount is verdict.memory["gradients"]
    # DeepSpeed's gradients are gone with the step, also under Accelerate
    gone = {"deepspeed": "", "accelerate": "zero"}.get(case.config.engine)
    assert sum(verdict.memory["gradients"].measured) > 0 or (gone is not None and gone in verdict.strategy)
    assert not verdict.peak, "it was not asked for, and takes its time"


@pytest.mark.parity
@pytest.mark.parametrize("case", [marked(case) for case in FIRST.values()])
def test_peaks_are_more_than_what_is_held_and_change_nothing(case: Case) -> None:
    verdict = world.verifier(measure=True).verify(case)
    assert verdict.status == "held", verdict.cause
    held = [sum(amount.measured[rank] for amount in verdict.memory.values()) for rank in range(verdict.world)]
    assert len(verdict.peak) == verdict.world
    assert all(peak > least for peak, least in zip(verdict.peak, held, strict=True))


@pytest.mark.unit
def test_the_matrix_holds_every_strategy_of_every_engine_at_every_world() -> None:
    found = {(c.config.engine, c.config.name.partition("-")[0], c.config.mesh.world) for c in CASES}
    for engine in engines():
        for strategy in strategies(engine):
            data = find(engine, strategy).AXIS == "dp"
            worlds = (2, 3, 4, 8) if data else (2, 3, 4)  # others as far as models go
            if required(engine):
                worlds = (2, 4) if data else (2,)
            assert {(engine, strategy, world) for world in worlds} <= found


@pytest.mark.unit
def test_the_matrix_tries_every_choice_of_every_option() -> None:
    for engine in engines():
        for strategy in strategies(engine):
            where = find(engine, strategy).AXIS
            cases = [getattr(c.config.mesh, where) for c in CASES if c.config.engine == engine]
            mine = [axis for axis in cases if axis.strategy == strategy]
            for option, field in find(engine, strategy).Options.model_fields.items():
                if field.annotation is bool:
                    assert (not field.default) in [axis.options.get(option) for axis in mine], (
                        engine,
                        strategy,
                        option,
                    )
            assert where != "dp" or required(engine) or any(axis.replicas == 2 for axis in mine)


def uses(case: Case, way: Way) -> bool:
    section = getattr(case.config.mesh, way.axis)
    return case.config.engine == "native" and way.settings.items() <= section.model_dump().items()


def active(case: Case) -> list[str]:
    return [axis for axis in AXES if getattr(case.config.mesh, axis).degree > 1]


@pytest.mark.unit
@pytest.mark.parametrize("axes", [*combinations(AXES, 2)], ids=" ".join)
def test_any_two_ways_of_two_axes_meet_alone_and_under_each_other_axis(axes: tuple[str, str]) -> None:
    for one, other in product(*map(ways, axes)):
        met = Counter(tuple(active(case)) for case in CASES if uses(case, one) and uses(case, other))
        wanted = [set(axes), *({*axes, third} for third in AXES if third not in axes)]
        assert all(any(set(found) == three for found in met) for three in wanted), (one.label, other.label)


@pytest.mark.unit
def test_the_matrix_goes_up_to_all_axes_and_replicas_on_32_ranks() -> None:
    assert len(CASES) >= 300
    largest = [case.config.mesh.degrees for case in CASES if case.config.mesh.world == 32]
    assert largest
    five = {"pp", "dp_replicate", "dp_shard", "cp", "tp"}
    assert all({axis for axis, degree in degrees.items() if degree == 2} == five for degrees in largest)
    full = [case for case in CASES if len(active(case)) == len(AXES)]
    assert all(any(uses(case, way) for case in full) for axis in AXES for way in ways(axis))


@pytest.mark.unit
def test_experts_are_cut_among_every_set_of_other_axes() -> None:
    """A composition that is refused is left out of the matrix without a word."""
    found = {frozenset(active(case)) for case in CASES if case.config.mesh.ep.degree > 1}
    others = [axis for axis in AXES if axis != "dp"]  # dp is what ep is carved out of
    assert found >= {frozenset({"dp", *some}) for size in range(4) for some in combinations(others, size)}


@pytest.mark.unit
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_the_matrix_holds_pairs_with_the_data_axis_and_three_axes_at_once(engine: str) -> None:
    meshes = [c.config.mesh for c in CASES if c.config.engine == engine]
    pairs = {
        (axis, m.dp.strategy) for m in meshes for axis in ("pp", "tp") if getattr(m, axis).degree == 2 == m.dp.degree
    }
    assert {(axis, data) for axis in ("pp", "tp") for data in ("ddp", "fsdp")} <= pairs
    assert [m for m in meshes if m.pp.degree == m.tp.degree == m.dp.degree == 2 and m.dp.strategy == "fsdp"]


@pytest.mark.unit
def test_two_axes_of_a_library_meet_unless_a_reason_is_given() -> None:
    met = {(case.config.engine, frozenset(name_of(case.config).split(" + "))) for case in CASES}
    apart = set()
    for engine in filter(required, engines()):
        for one, other in combinations(strategies(engine), 2):
            together = any(engine == where and {one, other} <= names for where, names in met)
            if find(engine, one).AXIS != find(engine, other).AXIS and not together:
                apart.add((engine, one, other))
    assert apart == {
        ("accelerate", "ddp", "tensor"),  # test_engine_meshes.py
        ("deepspeed", "pipeline", "tensor"),
        ("deepspeed", "pipeline", "zero2"),  # test_engine_deepspeed.py
        ("deepspeed", "pipeline", "zero3"),
    }


@pytest.mark.unit
def test_names_tell_cases_apart() -> None:
    assert len({name(case) for case in CASES}) == len(CASES)


@pytest.mark.unit
def test_the_matrix_hides_nothing() -> None:
    for case in CASES:
        train, data, model = case.config.train, case.config.data, case.config.model
        optimizer = "adamw" if case.config.name.endswith(", adamw") else "sgd_momentum"
        assert (train.steps, train.optimizer, data.mask, model.init) == (3, optimizer, "ragged", "rough")
    adamw = {(c.config.engine, c.config.mesh.dp.strategy) for c in CASES if c.config.train.optimizer == "adamw"}
    assert adamw == {
        (engine, name)
        for engine in engines()
        for name in strategies(engine)
        if (find(engine, name).AXIS == "dp" and not required(engine))
        or "offload" in find(engine, name).Options.model_fields
    }
    uneven = [c for c in CASES if c.config.train.batch % c.config.mesh.dp.degree]
    assert {c.config.mesh.dp.strategy for c in uneven} >= set(world.NATIVE)
