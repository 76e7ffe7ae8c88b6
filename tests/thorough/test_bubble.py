"""Schedules run with stages that sleep: as idle, and with as much kept, as the schedules' own table says."""

import pytest

from sandbox.measure.naps import Found, idle, measure
from sandbox.runtime import warm
from sandbox.schedules import SCHEDULES, bubble, peaks

RANKS, MICROBATCHES = 4, 8
BOUND = 0.05


@pytest.mark.parity
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_as_idle_and_keeps_as_much_as_its_table_says(name: str) -> None:
    warm("sandbox.measure.naps")
    found = asleep(name)
    assert found.kept == peaks(found.schedule)
    assert found.bubble == pytest.approx(bubble(found.schedule), abs=BOUND)


def asleep(name: str) -> Found:
    """Measured; on a busy machine again with longer sleeps, in which what others take weighs less."""
    for seconds, steps in ((0.03, 3), (0.06, 2), (0.12, 2)):
        found = measure(name, RANKS, MICROBATCHES, seconds, steps)
        if abs(found.bubble - bubble(found.schedule)) <= BOUND:
            break
    return found


@pytest.mark.unit
def test_idle_is_what_is_left_of_all_ranks_time() -> None:
    assert idle([[(0, 1), (2, 3)], [(1, 3)]]) == pytest.approx(1 / 3)
    assert idle([[(5, 6)]]) == 0
