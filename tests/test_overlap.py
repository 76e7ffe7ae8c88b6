"""What is sent while something is computed. Results are right too if one waits at once, so the order is what is tested.

The data axis has such tests beside its buckets and units.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sandbox import regions, ring
from sandbox.comm import Axis
from sandbox.measure.operations import Operations
from sandbox.regions import Border

pytestmark = pytest.mark.unit


class Log(list[str]):
    """What began and what was waited for, in order."""

    def pending(self, name: str, result: Tensor) -> Any:
        """What a collective returns."""
        self.append(f"start {name}")

        def wait() -> Tensor:
            self.append(f"wait for {name}")
            return result

        return SimpleNamespace(wait=wait)


# The ring


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Log:
    """A ring on paper: keys are float64, their gradients float32."""
    log = Log()

    class Attention:
        def __init__(self, q: Tensor, *_: Tensor) -> None:
            self.q = q

        def add(self, kv: Tensor, tiles: Any) -> Tensor:
            log.append("compute")
            return kv.float()

        def result(self) -> Any:
            return self.q

    class Once(Attention):
        def result(self) -> Any:
            return self.q, self.q

    def pass_on(tensor: Tensor, landing: Tensor, axis: Axis) -> Any:
        return log.pending("gradient" if tensor.dtype == torch.float32 else "block", landing)

    monkeypatch.setattr(ring, "pass_on", pass_on)
    monkeypatch.setattr(ring, "Forward", Once)
    monkeypatch.setattr(ring, "Backward", Attention)
    return log


def a_ring() -> tuple[Any, Tensor, Any, Axis]:
    q, kv = torch.zeros(1, 2, 4, 2, dtype=torch.float64), torch.zeros(2, 1, 2, 4, 2, dtype=torch.float64)
    batch = SimpleNamespace(columns_of=[range(4)] * 3, tiles=[[]] * 3)
    return SimpleNamespace(save_for_backward=lambda *_: None), q, (kv, batch), Axis(("cp",), 3, 0)


def test_the_next_block_of_a_ring_comes_while_this_one_is_computed(passed: Log) -> None:
    ctx, q, (kv, batch), axis = a_ring()
    ring.Ring.forward(ctx, q, kv, batch, axis)
    assert passed == ["start block", "compute", "wait for block", "start block", "compute", "wait for block", "compute"]


def test_gradients_go_round_a_step_behind_while_the_next_block_is_computed(passed: Log) -> None:
    _, q, (kv, batch), axis = a_ring()
    ctx = SimpleNamespace(saved_tensors=(q, kv, q, q), batch=batch, axis=axis)
    ring.Ring.backward(ctx, q)
    assert passed == [
        *("start block", "compute", "wait for block"),
        *("start block", "compute", "start gradient", "wait for block"),
        *("compute", "wait for gradient", "start gradient", "wait for gradient"),
    ]


# Tensor parallelism


class Products(Operations):
    """Notes every product of matrices."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def operate(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.log.append("product")
        return func(*args, **kwargs)


@pytest.mark.parametrize("sequence", [False, True])
def test_the_sum_of_the_inputs_gradient_is_under_way_while_weights_have_theirs(
    sequence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, axis = Log(), Axis(("tp",), 2, 0)

    def reduce_scatter(flat: Tensor, sizes: list[int], axis: Axis, dtype: torch.dtype) -> Any:
        return log.pending("sum", flat.split(sizes)[axis.rank])

    monkeypatch.setattr(regions, "all_reduce", lambda tensor, axis: log.pending("sum", tensor))
    monkeypatch.setattr(regions, "all_gather", lambda flat, sizes, axis: log.pending("gather", flat))
    monkeypatch.setattr(regions, "reduce_scatter", reduce_scatter)
    layers = [nn.Linear(4, 3, bias=False) for _ in range(2)]
    x = torch.zeros(1, 3, 4, requires_grad=True)
    out = sum(y.sum() for y in Border(axis, sequence, [3, 3]).linears(x, *layers))
    assert isinstance(out, Tensor)
    log.clear()
    with Products(log):
        out.backward()
    gather, came = (["start gather"], ["wait for gather"]) if sequence else ([], [])
    assert log == [*gather, "product", "product", "start sum", *came, "product", "product", "wait for sum"]
