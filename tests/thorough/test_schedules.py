"""Schedules are valid for any number of ranks and microbatches, and as short and as lean as their papers say."""

import re
from itertools import product
from xml.etree import ElementTree

import pytest

from sandbox.orders import LOOPED, VS, Action
from sandbox.report.schedule import gantt, text
from sandbox.schedules import SCHEDULES, Schedule, bubble, check, finish_times, make, peaks

pytestmark = pytest.mark.unit

RANKS = (2, 3, 4, 6, 8)
MICROBATCHES = (1, 2, 3, 4, 5, 7, 8, 12, 17, 24)
EACH = pytest.mark.parametrize("name", SCHEDULES)


def several(name: str) -> tuple[int, ...]:
    return (1, 2, 3) if name in LOOPED else (1,)


@EACH
def test_every_size_is_valid(name: str) -> None:
    for ranks, microbatches, stages in product(RANKS, MICROBATCHES, several(name)):
        check(make(name, ranks, microbatches, stages), microbatches)  # raises


@EACH
def test_the_first_rank_has_the_first_stage_and_each_rank_as_many(name: str) -> None:
    schedule = make(name, 4, 8, 2 if name in LOOPED else 1)
    each = 1 if name in ("gpipe", "1f1b", "zb_h1") else 2
    assert [len(schedule.held(rank)) for rank in range(4)] == [each] * 4
    assert schedule.homes[:4] == (0, 1, 2, 3)
    assert schedule.ends == ((0, 0) if name in VS else (0, 3))


@EACH
@pytest.mark.parametrize("ranks", RANKS)
def test_the_makespan_is_the_published_one(name: str, ranks: int) -> None:
    for microbatches, stages in product((2 * ranks, 3 * ranks, 8 * ranks), several(name)):
        schedule = make(name, ranks, microbatches, stages)
        each = len(schedule.held(0))
        idle = ranks - 1 if name in ("zb_h1", *VS) else 3 * (ranks - 1)
        makespan = max(finish_times(schedule).values())
        assert makespan == 3 * each * microbatches + idle
        assert bubble(schedule) == pytest.approx(idle / makespan)


@EACH
@pytest.mark.parametrize("ranks", RANKS)
def test_no_more_microbatches_are_live_than_published(name: str, ranks: int) -> None:
    for microbatches, stages in product((2 * ranks, 5 * ranks), several(name)):
        most = {
            "gpipe": microbatches,
            "1f1b": ranks,
            "interleaved": ranks + (ranks - 1) / stages if stages > 1 else 2 * ranks - 1,
            "breadth_first": microbatches,
            "zb_h1": ranks,
            "zbv": ranks,
            "dualpipe_v": ranks + 0.5,
        }
        found = peaks(make(name, ranks, microbatches, stages))
        assert max(found) == pytest.approx(most[name])
        if name == "1f1b":
            assert found == list(range(ranks, 0, -1))
        if name in ("gpipe", "zb_h1", *VS):
            assert len(set(found)) == 1


@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_of_zbv_hardly_waits_once_it_has_begun(ranks: int) -> None:
    schedule = make("zbv", ranks, 3 * ranks)
    ends = finish_times(schedule)
    for order in schedule.orders:
        first = ends[order[0]] - schedule.cost(order[0])
        assert ends[order[-1]] - first - sum(schedule.cost(action) for action in order) <= 1


def test_backward_takes_its_weights_along_unless_they_come_later() -> None:
    whole, apart = make("1f1b", 2, 4), make("zb_h1", 2, 4)
    assert whole.cost(Action("B", 0, 0), (1, 2, 3)) == 5
    assert apart.cost(Action("B", 0, 0), (1, 2, 3)) == 2
    assert apart.cost(Action("W", 0, 0), (1, 2, 3)) == 3
    mixed = make("dualpipe_v", 2, 8)
    assert 0 < len(mixed.split) < 8 * mixed.stages


def test_dearer_weights_make_the_zero_bubble_larger_than_dearer_inputs() -> None:
    cheap, dear = (1, 1.2, 0.8), (1, 0.8, 1.2)
    assert bubble(make("zb_h1", 4, 16), cheap) > bubble(make("zb_h1", 4, 16), dear)
    assert bubble(make("zb_h1", 4, 16), dear) < bubble(make("1f1b", 4, 16), dear)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda order: order[:-1], "rank 0 does B 0 1 0 times", id="lost"),
        pytest.param(lambda order: (*order, order[-1]), "rank 0 does B 0 1 2 times", id="twice"),
        pytest.param(lambda order: (*order, Action("F", 1, 0)), "rank 0 does F 1 0 1 times", id="another's"),
        pytest.param(lambda order: order[::-1], "the ranks wait for each other: rank 0 before B 0 1", id="deadlock"),
        pytest.param(
            lambda order: (Action("W", 0, 1), *order), "the ranks wait for each other: rank 0 before W 0 1", id="W < B"
        ),
    ],
)
def test_a_wrong_schedule_is_refused(change: object, said: str) -> None:
    good = make("gpipe", 2, 2)
    assert callable(change)
    bad = Schedule(good.homes, (tuple(change(good.orders[0])), good.orders[1]))
    with pytest.raises(ValueError, match=re.escape(said)):
        check(bad, 2)


@EACH
def test_messages_are_what_crosses_between_ranks(name: str) -> None:
    schedule = make(name, 4, 8, 2 if name in LOOPED else 1)
    crossing = [stage for stage in range(1, schedule.stages) if schedule.homes[stage - 1] != schedule.homes[stage]]
    assert sum(schedule.messages(rank) for rank in range(4)) == 2 * len(crossing)
    assert schedule.messages(0) == {1: 1, 2: 3 if name in LOOPED else 2}[len(schedule.held(0))]


# Drawings


@EACH
def test_a_drawing_shows_every_action_once(name: str) -> None:
    schedule = make(name, 3, 5)
    drawn = ElementTree.fromstring(gantt(schedule, name).svg(name))
    titles = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    actions = [title for title in titles if title and "idle" not in title]
    assert len(actions) == len(set(actions)) == sum(map(len, schedule.orders))
    assert len(titles) == len(actions) + 3


def test_a_text_shows_each_unit_of_time() -> None:
    *rows, last = text(make("1f1b", 2, 3)).splitlines()
    assert rows == [
        "rank 0   F0 F1 .  .  B0 B0 F2 B1 B1 .  B2 B2",
        "rank 1   .  F0 B0 B0 F1 B1 B1 F2 B2 B2 .  .",
    ]
    assert last == "bubble 25.0%, microbatches kept: 1 to 2"


def test_a_text_keeps_to_the_width() -> None:
    assert max(map(len, text(make("zbv", 4, 24), width=80).splitlines())) <= 80
