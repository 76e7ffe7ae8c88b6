"""Bugs that really happened are caught, each by its kind of cause, and what is not a bug is not."""

import pytest
import world

from sandbox.plan import strategies
from sandbox.verify import Case
from sandbox.verify.faults import FAULTS, Fault

EACH = pytest.mark.parametrize("fault", FAULTS.values(), ids=lambda fault: fault.name)
TWINS: dict[Case, list[Fault]] = {}
"""The bugs that are planted in the same case, for each such case."""
for fault in FAULTS.values():
    TWINS.setdefault(fault.clean(), []).append(fault)


@pytest.mark.parity
@EACH
def test_a_planted_bug_is_caught_and_its_cause_named(fault: Fault) -> None:
    verdict = world.verifier().verify(fault.sick())
    assert fault.caught(verdict), f"{verdict.status}: {verdict.cause}"


@pytest.mark.parity
@pytest.mark.parametrize("clean", TWINS, ids=[sick[0].name for sick in TWINS.values()])
def test_their_twin_without_the_bug_holds(clean: Case) -> None:
    verdict = world.verifier().verify(clean)
    assert verdict.status == "held", verdict.cause
    assert not any(fault.caught(verdict) for fault in TWINS[clean])


@pytest.mark.unit
def test_the_catalogue_is_large_and_each_bug_is_in_it_once() -> None:
    assert len(FAULTS) == 96, "docs/faults.md, the changelog and here say how many"
    assert len({fault.plant for fault in FAULTS.values()}) == len(FAULTS)
    assert all(name == fault.name for name, fault in FAULTS.items())
    assert all(fault.number >= 1 for fault in FAULTS.values())


@pytest.mark.unit
def test_the_axes_that_cut_the_model_have_bugs_of_their_own() -> None:
    assert sum(fault.strategy in ("tensor", "context", "pipeline") for fault in FAULTS.values()) >= 34


@pytest.mark.unit
@EACH
def test_a_bug_has_a_report_and_a_description(fault: Fault) -> None:
    assert fault.source.count("/") >= 6
    assert fault.source.rpartition("/")[2].isdigit()
    assert fault.plant.__doc__
    assert fault.sick().prepare is fault.plant
    sick, clean = fault.sick().config, fault.clean().config
    assert sick.name == f"{clean.name}, {fault.name}"
    assert sick.model_copy(update={"name": clean.name}) == clean


@pytest.mark.unit
def test_every_native_strategy_and_kind_of_cause_is_tried() -> None:
    assert {fault.strategy for fault in FAULTS.values()} == set(strategies("native"))
    assert {fault.kind for fault in FAULTS.values()} >= {
        "weighting", "scale", "reduction", "precision", "norm", "optimizer", "state", "data", "initialisation",
        "forward", "learning rate", "bytes", "memory",
    }  # fmt: skip


@pytest.mark.parity
def test_a_tampering_that_changes_nothing_holds() -> None:
    clean = FAULTS["clipped_by_the_local_norm"].clean()
    assert world.verifier().verify(Case(clean.config, prepare=world.nothing)).status == "held"
