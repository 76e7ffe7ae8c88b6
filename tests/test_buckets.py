"""Buckets: every gradient in one of them, all ranks in one order, nothing lost on the way."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sandbox.buckets import Bucket, ScatterSum, cut_buckets, reduce_in_backward
from sandbox.comm import Axis
from sandbox.config import Config
from sandbox.mesh import Mesh
from sandbox.partition import by_ranges, by_rows
from sandbox.program import Program, unsharded
from sandbox.units import Cut

pytestmark = pytest.mark.unit
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

SHAPES = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple), min_size=1, max_size=8)


def params(shapes: list[tuple[int, ...]]) -> dict[str, nn.Parameter]:
    return {f"p{i}": nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(shapes)}


@few
@given(SHAPES, st.integers(1, 8000))
def test_buckets_hold_the_parameters_last_first_and_are_as_small_as_they_may_be(
    shapes: list[tuple[int, ...]], limit: int
) -> None:
    buckets = cut_buckets(params(shapes), limit / 2**20)
    assert [name for bucket in buckets for name in bucket.params] == [f"p{i}" for i in reversed(range(len(shapes)))]
    for bucket in buckets:
        sizes = [4 * p.numel() for p in bucket.params.values()]
        assert 4 * bucket.numel == sum(sizes)
        assert sum(sizes[:-1]) < limit
        assert bucket is buckets[-1] or sum(sizes) >= limit


def test_views_are_the_parameters_parts_of_the_flat_tensor() -> None:
    bucket = Bucket(params([(2, 3), (4,)]))
    flat = torch.arange(10.0)
    views = bucket.views(flat)
    assert views["p0"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert views["p1"].tolist() == [6, 7, 8, 9]
    views["p1"].zero_()
    assert flat[6:].tolist() == [0] * 4


@pytest.mark.parametrize("lasting", [False, True])
def test_what_is_collected_is_moved_and_added(lasting: bool) -> None:
    bucket = Bucket(params([(2,), (3,)]), lasting=lasting)
    for value in (1.0, 2.0):
        bucket.params["p0"].grad = torch.full((2,), value)
        bucket.collect("p0")
        assert bucket.params["p0"].grad is None
    bucket.collect("p1")  # it has no gradient
    taken = bucket.take()
    assert taken.tolist() == [3, 3, 0, 0, 0]
    again = bucket.take()
    assert again.tolist() == [0] * 5, "a step leaves nothing to the next"
    assert (again is taken) == lasting
    assert taken.tolist() == ([0] * 5 if lasting else [3, 3, 0, 0, 0])


@pytest.mark.parametrize(("cut", "order"), [(by_rows, [1, 2, 5, 3, 4, 6]), (by_ranges, [1, 2, 3, 4, 5, 6])])
def test_a_bucket_sums_in_its_own_dtype_and_lays_out_by_its_partition(cut: Cut, order: list[int]) -> None:
    shapes = params([(2, 2), (2,)])
    bucket = Bucket(shapes, cut(shapes, 2), torch.float64)
    grads = {"p0": torch.tensor([[1.0, 3.0], [2.0, 4.0]]).T, "p1": torch.tensor([5.0, 6.0])}  # one is not contiguous
    for name in (*grads, *grads):
        bucket.params[name].grad = grads[name]
        bucket.collect(name)
    flat = bucket.take()
    assert flat.dtype == torch.float64
    assert flat.tolist() == [2 * value for value in order]


def stub(buckets: list[Bucket], *, each: bool) -> tuple[Program, list[Any]]:
    """A program, and what it reduces: (number, final, flat gradient), or (`finish`, final)."""
    log: list[Any] = []
    bare = replace(
        unsharded(Config(), Mesh({"dp": 1}), torch.device("cpu")),
        parameters={name: p for bucket in buckets for name, p in bucket.params.items()},
    )
    return (
        reduce_in_backward(
            bare,
            buckets,
            lambda number, final: log.append((number, final, buckets[number].take().tolist())),
            lambda final: log.append(("finish", final)),
            each=each,
        ),
        log,
    )


def backward(program: Program, names: list[str], *, final: bool) -> None:
    """A backward pass that yields the gradients of `names`, in that order, each of them one."""
    program.begin(final)
    for name in names:
        param = program.parameters[name]
        param.grad = torch.ones_like(param) if param.grad is None else param.grad + 1
        program.grad_ready(name)
    program.reduce_grads()


def three_passes(
    shapes: list[tuple[int, ...]], limit: int, random: Any, *, each: bool
) -> tuple[list[Bucket], list[list[str]], list[Any]]:
    """Three passes, each over some of the parameters in any order -> the buckets, the passes and what was launched."""
    buckets = cut_buckets(params(shapes), limit / 2**20)
    program, log = stub(buckets, each=each)
    passes = [[name for name in program.parameters if random.random() < 0.7] for _ in range(3)]
    for number, names in enumerate(passes):
        random.shuffle(names)
        backward(program, names, final=number == 2)
    return buckets, passes, log


@few
@given(SHAPES, st.integers(1, 4000), st.randoms(use_true_random=False), st.booleans())
def test_buckets_start_in_one_order_whatever_came_when_or_never(
    shapes: list[tuple[int, ...]], limit: int, random: Any, each: bool
) -> None:
    buckets, _, log = three_passes(shapes, limit, random, each=each)
    rounds = [False, False, True] if each else [True]
    order = [(number, final) for final in rounds for number in [*range(len(buckets)), "finish"]]
    assert [(entry[0], entry[1]) for entry in log] == order


@few
@given(SHAPES, st.integers(1, 4000), st.randoms(use_true_random=False), st.booleans())
def test_no_gradient_is_lost_whichever_passes_used_the_parameter(
    shapes: list[tuple[int, ...]], limit: int, random: Any, each: bool
) -> None:
    buckets, passes, log = three_passes(shapes, limit, random, each=each)
    for number, bucket in enumerate(buckets):
        total = torch.tensor([entry[2] for entry in log if entry[0] == number]).sum(0)
        for name, view in bucket.views(total).items():
            assert (view == sum(name in names for names in passes)).all(), name


def test_a_bucket_starts_before_the_pass_is_over() -> None:
    program, log = stub([Bucket(params([(2,)])), Bucket({"q": nn.Parameter(torch.zeros(2))})], each=False)
    program.begin(True)
    program.grad_ready("q")
    assert log == [], "not before those in front of it"
    program.grad_ready("p0")
    assert [entry[0] for entry in log] == [0, 1]


def test_passes_before_the_last_are_left_alone_unless_each_is_reduced() -> None:
    buckets = [Bucket(params([(2,)]))]
    program, log = stub(buckets, each=False)
    backward(program, ["p0"], final=False)
    assert log == []
    assert buckets[0].params["p0"].grad is not None
    backward(program, ["p0"], final=True)
    assert log == [(0, True, [2, 2]), ("finish", True)]


def test_hooks_of_the_program_before_are_called_too() -> None:
    calls: list[Any] = []
    buckets = [Bucket(params([(1,)]))]
    bare, _ = stub(buckets, each=True)
    wrapped = replace(
        bare,
        begin=lambda final: calls.append(("begin", final)),
        grad_ready=lambda name: calls.append(("ready", name)),
        reduce_grads=lambda: calls.append("reduce"),
    )
    outer = reduce_in_backward(wrapped, [Bucket(params([(1,)]))], lambda *_: None, lambda _: None, each=True)
    outer.begin(True)
    outer.grad_ready("p0")
    outer.reduce_grads()
    assert calls == [("begin", True), ("ready", "p0"), "reduce"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scattered_sums_add_up_over_passes(dtype: torch.dtype) -> None:
    alone = Axis(("dp",), 1, 0)
    sums = ScatterSum([alone] * 5, alone, dtype)
    for value in (1.0, 2.0, 4.0):
        for number in range(5):
            sums.launch(number, torch.full((3,), value * (number + 1)), [3], final=value == 4.0)
    sums.finish()
    assert {number: total.tolist() for number, total in sums.sums.items()} == {n: [7.0 * (n + 1)] * 3 for n in range(5)}
    assert {total.dtype for total in sums.sums.values()} == {dtype}
    assert math.isclose(sum(total.sum() for total in sums.sums.values()), 315)
