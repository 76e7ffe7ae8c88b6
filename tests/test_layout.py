"""Where a piece lies: taking and putting are inverse, cuts compose, and all pieces together are the whole, once."""

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.layout import Layout, local

pytestmark = pytest.mark.unit
few = settings(max_examples=80, deadline=None, derandomize=True, database=None)

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def bounds(draw: st.DrawFn, total: int, parts: int) -> list[int]:
    """Where to cut `total` elements into `parts`, some of them empty."""
    inner = draw(st.lists(st.integers(0, total), min_size=parts - 1, max_size=parts - 1))
    return [0, *sorted(inner), total]


@st.composite
def pieces(draw: st.DrawFn) -> tuple[Layout, np.ndarray]:
    """A layout by up to three cuts and two ranges, and the same elements by NumPy's own indexing."""
    shape = draw(SHAPES)
    layout, index = Layout.whole(shape), np.arange(math.prod(shape)).reshape(shape)
    for _ in range(draw(st.integers(0, 3))):
        dim = draw(st.integers(0, len(shape) - 1))
        _, start, stop, _ = draw(bounds(index.shape[dim], 3))
        layout, index = layout.cut(dim, start, stop, ("a",)), np.take(index, np.arange(start, stop), dim)
    for _ in range(draw(st.integers(0, 2))):
        _, start, stop, _ = draw(bounds(index.size, 3))
        layout, index = layout.range(start, stop, ("b",)), index.reshape(-1)[start:stop]
    return layout, index


@few
@given(pieces())
def test_a_piece_is_what_numpy_cuts(piece: tuple[Layout, np.ndarray]) -> None:
    layout, index = piece
    full = torch.arange(math.prod(layout.shape)).view(layout.shape)
    assert layout.take(full).numpy().tolist() == index.tolist()
    assert layout.local_shape == index.shape
    assert layout.numel == index.size


@few
@given(pieces())
def test_putting_reverses_taking_and_touches_nothing_else(piece: tuple[Layout, np.ndarray]) -> None:
    layout, index = piece
    full = torch.randn(layout.shape)
    empty = torch.full_like(full, torch.nan)
    layout.put(empty, layout.take(full).clone())
    inside = np.isin(np.arange(full.numel()), index).reshape(layout.shape)
    assert torch.equal(empty.isnan(), torch.from_numpy(~inside))
    assert torch.equal(empty.nan_to_num(0), torch.where(torch.from_numpy(inside), full, 0))


def cut_everything(shape: tuple[int, ...], cuts: list[list[int]], ranges: int, shift: int = 0) -> torch.Tensor:
    """Cut each dimension at `cuts`, each box into `ranges`, and count how often each element is covered."""
    count = torch.zeros(shape)
    for spans in product(*(list(pairwise(cut)) for cut in cuts)):
        box = Layout.whole(shape)
        for dim, span in enumerate(spans):
            box = box.cut(dim, *span, ("tp",))
        ends = [box.numel * part // ranges for part in range(ranges + 1)]
        for start, stop in pairwise(ends):
            piece = box.range(max(0, start - shift), stop, ("dp",))
            one = torch.zeros(shape)
            piece.put(one, torch.ones(piece.numel))
            count += one
    return count


@few
@given(st.data())
def test_all_pieces_together_cover_every_element_once(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    cuts = [data.draw(bounds(size, data.draw(st.integers(1, 3)))) for size in shape]
    assert (cut_everything(shape, cuts, data.draw(st.integers(1, 4))) == 1).all()


def test_an_overlap_of_one_element_would_be_seen() -> None:
    assert (cut_everything((3, 4), [[0, 1, 3], [0, 2, 4]], 2) == 1).all()
    assert (cut_everything((3, 4), [[0, 1, 3], [0, 2, 4]], 2, shift=1) != 1).any()


def test_cuts_compose() -> None:
    twice = Layout.whole((6, 4)).cut(0, 2, 6, ("tp",)).cut(0, 1, 3, ("dp",)).range(2, 7, ("zero",)).range(1, 4, ())
    assert (twice.offset, twice.size, twice.span) == ((3, 0), (2, 4), (3, 6))
    assert twice.sharded == ("tp", "dp", "zero")
    assert twice.take(torch.arange(24).view(6, 4)).tolist() == [15, 16, 17]


def test_a_range_cannot_be_cut_by_dimension() -> None:
    with pytest.raises(ValueError, match="no dimensions left"):
        Layout.whole((4, 4)).range(0, 8, ()).cut(0, 0, 1, ())


def test_the_whole_is_a_view_of_the_tensor() -> None:
    full = torch.zeros(2, 3)
    Layout.whole((2, 3)).take(full).fill_(1)
    assert full.all()


def test_a_plain_tensor_is_its_own_local_part() -> None:
    tensor = torch.zeros(2)
    assert local(tensor) is tensor
