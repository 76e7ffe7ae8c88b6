"""Collectives: the right sum at every size and dtype, in one order, for the bytes that the formulas say."""

from typing import cast

import pytest
import torch
import torch.distributed as dist
import world
from torch import Tensor

from sandbox.comm import Axis, all_gather, all_reduce, pass_on, reduce_scatter, ring_bytes
from sandbox.recorder import Recorder
from sandbox.runtime import Board, launch

WORLDS = pytest.mark.parametrize("size", [2, 3, 4])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
SIZES = pytest.mark.parametrize("label", world.SIZES)


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Tensor]]]:
    """Results of all collectives, by world."""
    return {size: launch(size, world.collectives, timeout=world.TIMEOUT) for size in (2, 3, 4)}


def brought(size: int, label: str, dtype: torch.dtype) -> list[Tensor]:
    return [world.numbers(rank, sum(world.SIZES[label][:size]), dtype) for rank in range(size)]


def summed(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One after the other in rank order."""
    total = tensors[0].to(dtype)
    for tensor in tensors[1:]:
        total = total + tensor.to(dtype)
    return total


@pytest.mark.parity
@WORLDS
@DTYPES
@SIZES
def test_reduce_scatter_sums_in_rank_order_and_in_full_precision(
    found: dict[int, list[dict[str, Tensor]]], size: int, label: str, dtype: torch.dtype
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    parts = summed(brought(size, label, dtype), wide).split(world.SIZES[label][:size])
    for rank, part in zip(found[size], parts, strict=True):
        result = rank[f"reduce_scatter {label} {dtype}"]
        assert result.dtype == wide
        assert torch.equal(result, part)


@pytest.mark.unit
def test_a_sum_in_bfloat16_or_in_another_order_would_be_seen() -> None:
    short = brought(4, "uneven", torch.bfloat16)
    assert not torch.equal(summed(short, torch.bfloat16).float(), summed(short, torch.float32))
    exact = brought(4, "large", torch.float64)
    assert not torch.equal(summed(exact, torch.float64), summed(exact[::-1], torch.float64))


@pytest.mark.parity
@WORLDS
@DTYPES
@SIZES
def test_all_reduce_is_the_sum_and_the_same_bits_on_all_ranks(
    found: dict[int, list[dict[str, Tensor]]], size: int, label: str, dtype: torch.dtype
) -> None:
    results = [rank[f"all_reduce {label} {dtype}"] for rank in found[size]]
    assert all(torch.equal(result, results[0]) for result in results)
    exact = summed(brought(size, label, dtype), torch.float64)
    assert results[0].dtype == dtype
    assert torch.allclose(results[0].double(), exact, rtol=0, atol=4 * size * torch.finfo(dtype).eps)


@pytest.mark.parity
@WORLDS
@DTYPES
@SIZES
def test_all_gather_brings_every_part_in_rank_order(
    found: dict[int, list[dict[str, Tensor]]], size: int, label: str, dtype: torch.dtype
) -> None:
    whole = torch.cat([world.numbers(rank, count, dtype) for rank, count in enumerate(world.SIZES[label][:size])])
    assert all(torch.equal(rank[f"all_gather {label} {dtype}"], whole) for rank in found[size])


@pytest.mark.parity
@WORLDS
def test_results_repeat_to_the_bit(found: dict[int, list[dict[str, Tensor]]], size: int) -> None:
    for rank in found[size]:
        first = {name: result for name, result in rank.items() if not name.endswith("again")}
        assert len(rank) == 2 * len(first)
        assert all(torch.equal(result, rank[f"{name} again"]) for name, result in first.items())


@pytest.mark.parity
@WORLDS
def test_gathers_and_reductions_may_be_awaited_in_different_order(size: int) -> None:
    rounds = 3
    for rank, (gathers, scatters) in enumerate(launch(size, world.crossed, rounds, timeout=world.TIMEOUT)):
        for number in range(rounds):
            parts = [torch.full((world.crossed_size(number),), 10.0 * number + other) for other in range(size)]
            assert torch.equal(gathers[number], torch.cat(parts)), (rank, number)
            assert torch.equal(scatters[number], torch.stack(parts).sum(0)), (rank, number)


@pytest.mark.parity
@WORLDS
def test_the_bytes_recorded_are_those_of_the_formulas(size: int) -> None:
    sizes = world.SIZES["uneven"][:size]
    whole, item = sum(sizes), 4
    for rank, (sent, events, board) in enumerate(launch(size, world.recorded, timeout=world.TIMEOUT)):
        own = sizes[rank]
        wanted = {
            "reduce_scatter dp": (whole - own) * item,
            "all_gather dp": (size - 1) * own * item,
            "all_reduce dp": 2 * (size - 1) / size * whole * item,
            "norm dp": 2 * (size - 1) / size * whole * item,
        }
        assert sent == pytest.approx(wanted, rel=1e-12)
        assert [f"{op} {axis}" for _, op, axis, _, _ in events] == list(wanted)
        assert [number for number, *_ in events] == [1, 2, 3, 4]
        assert all(took_time for *_, took_time in events)
        assert [bytes_ for *_, bytes_, _ in events] == pytest.approx(list(wanted.values()))
        assert board.startswith(f"finished #4 norm of float32[{whole}] over dp")


@pytest.mark.unit
def test_on_one_rank_nothing_is_sent_and_nothing_changes() -> None:
    recorder = Recorder(board=Board.private())
    axis = Axis(("dp",), 1, 0, None, recorder)
    flat = torch.arange(5.0)
    assert torch.equal(all_reduce(flat.clone(), axis).wait(), flat)
    assert torch.equal(all_gather(flat.clone(), [5], axis).wait(), flat)
    part = reduce_scatter(flat.bfloat16(), [5], axis, torch.float32).wait()
    assert torch.equal(part, flat)
    assert part.dtype == torch.float32
    assert sum(recorder.sent.values()) == 0
    assert recorder.number == 3
    assert recorder.events == [], "events are kept only if they are asked for"


@pytest.mark.unit
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_an_all_reduce_sends_what_a_reduce_scatter_and_an_all_gather_send(ranks: int) -> None:
    sizes = [5, 3, 0, 7, 7, 1, 2, 9][:ranks]
    whole = sum(sizes)
    both = sum((whole - own) + (ranks - 1) * own for own in sizes)
    assert ring_bytes(whole, ranks) * ranks == pytest.approx(both)


@pytest.mark.unit
def test_all_is_sent_before_anything_may_come() -> None:
    group = Asked()
    axis = Axis(("dp",), 4, 1, cast(dist.ProcessGroup, group))
    all_gather(torch.zeros(8), [2, 2, 2, 2], axis)
    assert group.asked == ["send to 2", "send to 3", "send to 0", "receive from 0", "receive from 3", "receive from 2"]
    group.asked.clear()
    pass_on(torch.zeros(8), torch.zeros(8), axis)
    assert group.asked == ["send to 2", "receive from 0"]


class Asked:
    """A group that notes in which order it is asked to send and to receive."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> None:
        self.asked.append(f"send to {to}")

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> None:
        self.asked.append(f"receive from {source}")
