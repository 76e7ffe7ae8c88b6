"""Parts of a bucket: every element on one rank, sizes alike, flattening and its inverse, views and not copies."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from sandbox.layout import Layout
from sandbox.partition import Partition, by_ranges, by_rows

pytestmark = pytest.mark.unit
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

SHAPES = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5)
RANKS = st.integers(1, 7)
CUTS = pytest.mark.parametrize("cut", [by_ranges, by_rows])


def params(shapes: list[tuple[int, ...]]) -> dict[str, nn.Parameter]:
    """Parameters whose elements are all different."""
    ends = [math.prod(shape) for shape in shapes]
    numbers = torch.arange(sum(ends), dtype=torch.float64).split(ends)
    return {
        f"p{i}": nn.Parameter(part.view(shape)) for i, (shape, part) in enumerate(zip(shapes, numbers, strict=True))
    }


def counts(partition: Partition) -> dict[str, torch.Tensor]:
    """How many ranks hold each element, by the layouts."""
    found = {name: torch.zeros(shape) for name, shape in partition.shapes.items()}
    for rank, spans in enumerate(partition.spans):
        for name in spans:
            layout = partition.layout(name, rank, Layout.whole(tuple(partition.shapes[name])), ("dp",))
            one = torch.zeros(partition.shapes[name])
            layout.put(one, torch.ones(layout.local_shape))
            found[name] += one
    return found


@few
@given(SHAPES, RANKS)
@example([(1,), (1,)], 7)
def test_ranges_hold_every_element_once_in_sizes_that_differ_by_one(shapes: list[tuple[int, ...]], ranks: int) -> None:
    partition = by_ranges(params(shapes), ranks)
    assert all((count == 1).all() for count in counts(partition).values())
    assert max(partition.sizes) - min(partition.sizes) <= 1
    assert sorted(partition.sizes, reverse=True) == partition.sizes


@few
@given(SHAPES, RANKS)
@example([(1, 5)] * 4, 3)
def test_rows_are_held_once_and_odd_ones_go_round(shapes: list[tuple[int, ...]], ranks: int) -> None:
    partition = by_rows(params(shapes), ranks)
    assert all((count == 1).all() for count in counts(partition).values())
    held = [[0] * ranks for _ in shapes]
    for rank, spans in enumerate(partition.spans):
        for index, (name, (start, stop)) in enumerate(spans.items()):
            width = math.prod(partition.shapes[name][1:])
            assert start % width == stop % width == 0
            held[index][rank] = (stop - start) // width
    assert all(max(rows) - min(rows) <= 1 for rows in held), "of each parameter"
    together = [sum(rows) for rows in zip(*held, strict=True)]
    assert max(together) - min(together) <= 1, "of all parameters"


@CUTS
def test_a_span_that_is_one_off_would_be_seen(cut: object) -> None:
    partition = cut(params([(6, 2)]), 3)  # type: ignore[operator]
    start, stop = partition.spans[1]["p0"]
    wrong = [partition.spans[0], {"p0": (start - 2, stop)}, partition.spans[2]]
    assert (counts(partition)["p0"] == 1).all()
    assert (counts(replace(partition, spans=wrong))["p0"] == 2).any()


def laid_out(partition: Partition, wholes: dict[str, torch.Tensor]) -> torch.Tensor:
    """All parts end to end in rank order, from what each rank's layouts take."""
    return torch.cat(
        [
            partition.layout(name, rank, Layout.whole(tuple(whole.shape)), ("dp",)).take(whole).reshape(-1)
            for rank in range(len(partition.spans))
            for name, whole in wholes.items()
        ]
    )


@CUTS
@few
@given(shapes=SHAPES, ranks=RANKS)
def test_places_say_where_each_element_lies_in_all_parts_together(
    cut: object, shapes: list[tuple[int, ...]], ranks: int
) -> None:
    wholes = {name: p.detach() for name, p in params(shapes).items()}
    partition = cut(params(shapes), ranks)  # type: ignore[operator]
    flat = laid_out(partition, wholes)
    assert sorted(flat.tolist()) == list(range(sum(partition.sizes)))
    for name, pieces in partition.split(flat).items():
        assert [len(piece) for piece in pieces] == partition.lengths[name]
        assert torch.equal(torch.cat(pieces), wholes[name].flatten())
        assert all(piece.untyped_storage()._cdata == flat.untyped_storage()._cdata for piece in pieces), "views"


@CUTS
@few
@given(shapes=SHAPES, ranks=RANKS)
def test_unflattening_brings_every_element_home(cut: object, shapes: list[tuple[int, ...]], ranks: int) -> None:
    wholes = {name: p.detach() for name, p in params(shapes).items()}
    partition = cut(params(shapes), ranks)  # type: ignore[operator]
    again = torch.full((sum(partition.sizes),), torch.nan, dtype=torch.float64)
    partition.unflatten(laid_out(partition, wholes), partition.homes(again))
    assert torch.equal(again, torch.cat([whole.flatten() for whole in wholes.values()]))


@CUTS
@few
@given(shapes=SHAPES, ranks=RANKS)
def test_pieces_of_a_part_are_what_its_layouts_say(cut: object, shapes: list[tuple[int, ...]], ranks: int) -> None:
    wholes = {name: p.detach() for name, p in params(shapes).items()}
    partition = cut(params(shapes), ranks)  # type: ignore[operator]
    for rank, part in enumerate(laid_out(partition, wholes).split(partition.sizes)):
        for name, piece in partition.pieces(part, rank).items():
            layout = partition.layout(name, rank, Layout.whole(tuple(wholes[name].shape)), ("dp",))
            assert layout.sharded == ("dp",)
            assert torch.equal(piece, layout.take(wholes[name]))
            assert piece.dim() == (wholes[name].dim() if cut is by_rows else 1)


@CUTS
def test_pieces_are_views_of_the_part(cut: object) -> None:
    partition = cut(params([(3, 2), (5,)]), 2)  # type: ignore[operator]
    part = torch.zeros(partition.sizes[1])
    for piece in partition.pieces(part, 1).values():
        piece.fill_(1)
    assert part.all()


def test_ranges_in_rank_order_are_the_parameters_in_order() -> None:
    """So that gathering writes them where they are used: no copies."""
    wholes = {name: p.detach() for name, p in params([(3, 2), (5,), (2, 2)]).items()}
    assert laid_out(by_ranges(params([(3, 2), (5,), (2, 2)]), 4), wholes).tolist() == list(range(15))
    assert laid_out(by_rows(params([(3, 2), (5,), (2, 2)]), 4), wholes).tolist() != list(range(15))


def test_a_cut_goes_inside_the_box_that_is_there() -> None:
    """Tensor parallelism has left columns 4 to 6 of a [6, 8]; FSDP takes rows of that, ZeRO a range."""
    box = Layout.whole((6, 8)).cut(1, 4, 6, ("tp",))
    bucket = {"p": nn.Parameter(torch.empty(6, 2))}
    full = torch.arange(48).view(6, 8)
    rows, span = (cut(bucket, 4).layout("p", 1, box, ("dp",)) for cut in (by_rows, by_ranges))
    assert rows.take(full).tolist() == [[20, 21], [28, 29]]
    assert span.take(full).tolist() == [13, 20, 21]
    assert rows.sharded == span.sharded == ("tp", "dp")
