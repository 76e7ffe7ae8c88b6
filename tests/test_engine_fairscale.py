"""FairScale by itself: what docs/what-the-libraries-do-differently.md says of it is still so."""

import functools
import inspect
from pathlib import Path

import fairscale
import library_work as work
import pytest
import torch
from torch import nn

from sandbox.engines.fairscale import UNSUPPORTED, zero1
from sandbox.errors import UnsupportedError
from sandbox.model import build
from sandbox.plan import find, plan, preload
from sandbox.runtime import launch, warm
from sandbox.verify.cases import MODEL, alone

pytestmark = [pytest.mark.parity, pytest.mark.engines]
run = functools.partial(launch, timeout=60)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    warm(*preload("fairscale"))


def test_sharded_ddp_is_wrong_from_the_second_step_if_gradients_are_set_to_none() -> None:
    right = [1.5, 1.5, 1.5]
    assert run(2, work.sharded_ddp)[0] != right
    assert run(2, work.sharded_ddp)[0][0] == 1.5  # so that one step does not show it
    assert run(2, functools.partial(work.sharded_ddp, to_none=False))[0] == right
    assert run(2, functools.partial(work.sharded_ddp, reduce_buffer_size=0))[0] == right


def test_sharded_ddp_divides_what_is_reduced_already_unless_only_the_last_pass_is() -> None:
    alone = functools.partial(work.sharded_ddp, passes=3, reduce_buffer_size=0)
    assert run(2, alone)[0][0] == 4.5
    assert run(2, functools.partial(alone, no_sync=False))[0][0] == 2.625  # 0.58 times


def test_oss_counts_its_norm_over_all_ranks_and_not_over_its_group() -> None:
    assert run(4, work.oss_norm, 1) == pytest.approx([1.0] * 4)
    assert run(4, work.oss_norm, 2) == pytest.approx([2**0.5] * 4)


def test_oss_has_no_norm_of_float64() -> None:
    from fairscale.internal.params import calc_grad_norm

    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    param.grad = torch.full_like(param, 0.1)
    with pytest.raises(RuntimeError, match=r"\(Double\) should be convertible without narrowing"):
        calc_grad_norm([param], 2)


@pytest.mark.filterwarnings("ignore")
def test_fsdp_does_not_run_on_cpu_without_our_stand_in() -> None:
    assert run(2, work.fairscale_fsdp, torch.float32, work.forward) == ["KeyError: 'all_gather'"] * 2
    assert all("CUDA" in error for error in run(2, work.fairscale_fsdp, torch.float32, work.clip))


def test_fsdp_refuses_float64() -> None:
    assert all("Expecting FP16 param type" in e for e in run(2, work.fairscale_fsdp, torch.float64, work.forward))
    with pytest.raises(UnsupportedError, match=r"cannot run fsdp in float64: .*Set train.dtype: float32"):
        plan(alone("fairscale", "fsdp", 2, "", dtype="float64").config)


def test_owners_are_those_of_oss() -> None:
    from fairscale.optim import OSS

    class Paper(OSS):  # deals out without a world
        def __init__(self, params: list[dict[str, object]], ranks: int) -> None:
            self.param_groups, self.world_size, self._partition_parameters = params, ranks, []

    model = build(MODEL, "float32")
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    for ranks in (2, 3, 4):
        dealt = Paper([{"params": matrices}, {"params": vectors}], ranks).partition_parameters()
        theirs = {names[id(p)]: rank for rank, groups in enumerate(dealt) for group in groups for p in group["params"]}
        assert theirs == zero1.owners(model, ranks)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_fairscale_lacks_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"engine fairscale cannot run {name}: .{{20}}"):
        find("fairscale", name)


def test_fairscale_still_has_no_ddp_of_its_own() -> None:
    from fairscale.nn import data_parallel

    assert {"ShardedDataParallel", "FullyShardedDataParallel"} <= vars(data_parallel).keys()
    assert not [name for name in vars(data_parallel) if name.startswith("Distributed")]


@pytest.mark.filterwarnings("ignore:fairscale.nn.Pipe has been upstreamed")
def test_pipe_is_right_and_runs_all_stages_in_one_process() -> None:
    from fairscale.nn import Pipe

    assert not [name for name in inspect.signature(Pipe.__init__).parameters if "group" in name or "rank" in name]
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    layers(x).square().sum().backward()
    expected = [p.grad for p in layers.parameters()]
    layers.zero_grad()
    pipe = Pipe(layers, balance=[2, 1], devices=["cpu", "cpu"], chunks=3, checkpoint="never")
    pipe(x).square().sum().backward()
    assert all(torch.allclose(a, b.grad, rtol=1e-12) for a, b in zip(expected, pipe.parameters(), strict=True))


def test_fairscale_still_has_no_context_parallelism() -> None:
    names = [file.stem for file in Path(fairscale.__path__[0]).rglob("*.py")]
    assert len(names) > 50
    assert not [name for name in names if any(word in name for word in ("context", "ring_", "ulysses"))]


def test_replicas_are_refused_where_oss_would_count_them_again() -> None:
    for strategy in ("zero1", "zero2", "fsdp"):
        with pytest.raises(UnsupportedError, match=r"mesh\.dp\.replicas: 1"):
            plan(alone("fairscale", strategy, 4, "", {"replicas": 2}).config)
