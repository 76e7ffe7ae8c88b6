"""Ranks that do not start the same collectives are told apart, whether they hang, fail, or compute something else."""

import re
import time
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import Any

import desync_work as work
import pytest
import world

from sandbox.config import Run
from sandbox.errors import WorkerError
from sandbox.runtime import launch
from sandbox.runtime.board import KEPT, Board, size_of
from sandbox.runtime.desync import desync, uneven
from sandbox.verify import Case, fixture

unit, parity = pytest.mark.unit, pytest.mark.parity

Call = tuple[int, str, str, int]  # as Board.start
ALL, PAIR = 0b111, 0b101


def boards(*ranks: Sequence[Call]) -> list[Board]:
    memory = mmap(-1, size_of(len(ranks)))
    found = [Board(memory, rank) for rank in range(len(ranks))]
    for board, calls in zip(found, ranks, strict=True):
        for call in calls:
            board.start(*call)
    return found


LOSS, NORM, GATHER = (ALL, "loss", "dp", 8), (ALL, "norm", "dp", 8), (ALL, "all_gather", "dp", 64)
OTHER = (PAIR, "all_reduce", "tp", 32)


@unit
@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([[], [], []], ""),
        ([[LOSS, NORM], [LOSS, NORM], [LOSS, NORM]], ""),
        ([[LOSS, NORM], [LOSS], []], ""),  # behind, perhaps on their way
        ([[OTHER, LOSS, OTHER], [LOSS], [LOSS, OTHER, OTHER]], ""),  # groups have each their own order
        (
            [[LOSS, NORM], [NORM, LOSS], [LOSS, NORM]],
            "Ranks disagree on collective 1 over dp: ranks 0 and 2: loss of 8 bytes over dp, "
            "rank 1: norm of 8 bytes over dp.",
        ),
        (
            [[LOSS, GATHER], [LOSS, GATHER], [LOSS, (ALL, "all_gather", "dp", 72)]],
            "Ranks disagree on collective 2 over dp: ranks 0 and 1: all_gather of 64 bytes over dp, "
            "rank 2: all_gather of 72 bytes over dp.",
        ),
        (
            [[OTHER], [], [(PAIR, "all_reduce", "cp", 32)]],
            "Ranks disagree on collective 1 over tp: rank 0: all_reduce of 32 bytes over tp, "
            "rank 2: all_reduce of 32 bytes over cp.",
        ),
        (
            [[LOSS, *[NORM] * KEPT], [NORM] * (1 + KEPT), []],
            "Ranks disagree on the collectives over dp, at number 2 or before: ranks 0 and 1.",
        ),
    ],
)
def test_the_first_collective_that_differs_is_named(ranks: list[list[Call]], text: str) -> None:
    assert desync(boards(*ranks)) == text


@unit
@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([[LOSS], [LOSS], [LOSS]], ""),
        ([[LOSS], [LOSS], []], "Collectives started over dp: ranks 0 and 1: 1, rank 2: 0."),
        ([[LOSS, OTHER], [LOSS], [LOSS]], "Collectives started over tp: rank 0: 1, rank 2: 0."),
    ],
)
def test_those_who_are_behind_are_named(ranks: list[list[Call]], text: str) -> None:
    assert uneven(boards(*ranks)) == text


def fault(world_: int, *args: Any) -> str:
    with pytest.raises(WorkerError) as caught:
        launch(world_, *args, timeout=2)
    return str(caught.value)


@parity
@pytest.mark.parametrize(
    ("sabotage", "text"),
    [
        (work.swap, "collective 3 over dp: ranks 0 and 2: loss of 8 bytes over dp, rank 1: norm of 8 bytes over dp."),
        (work.skip, "collective 4 over dp: ranks 0 and 2: norm of 8 bytes over dp, rank 1: loss of 8 bytes over dp."),
        (work.call_another, "collective 4 over dp: .* rank 1: all_gather of 12 bytes over dp."),
        (work.resize, "collective 4 over dp: .* rank 1: norm of 4 bytes over dp."),
    ],
)
def test_a_rank_that_calls_another_collective_is_named(sabotage: Callable[..., None], text: str) -> None:
    assert re.search(f"Ranks disagree on {text}", fault(3, work.in_order, sabotage))


@parity
def test_a_collective_that_the_others_never_start_is_named() -> None:
    assert fault(2, work.unmatched) == "Collectives started over dp: rank 0: 2, rank 1: 1."


@parity
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_verifying_names_the_desync(strategy: str) -> None:
    config = fixture(world.config(strategy, 3)).model_copy(update={"run": Run(timeout=3)})
    started = time.monotonic()
    verdict = world.verifier().verify(Case(config, work.other_first))
    assert time.monotonic() - started < world.TIMEOUT / 2, "as soon as they disagree, not when time is up"
    assert verdict.status == "failed"
    assert re.search(r"Ranks disagree on collective \d+ over dp_shard: .*rank 1: norm of 8 bytes", verdict.cause)
    assert world.verifier().verify(Case(config)).held
