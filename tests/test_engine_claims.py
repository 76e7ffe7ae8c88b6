"""What docs/what-the-libraries-do-differently.md says in numbers, and of what is built when, is still so."""

import functools
from typing import Any

import library_work as work
import pytest
import torch
from torch import nn

from sandbox.engines.accelerate._accelerator import make_accelerator
from sandbox.engines.deepspeed import _engine
from sandbox.engines.fairscale import fsdp, zero1
from sandbox.model import build
from sandbox.plan import preload
from sandbox.runtime import Member, launch, warm
from sandbox.verify.cases import MODEL

pytestmark = [pytest.mark.parity, pytest.mark.engines]
run = functools.partial(launch, timeout=60)


def test_the_largest_owner_under_oss_has_more_than_twice_the_smallest() -> None:
    model = build(MODEL, "float32")
    parts = [0, 0, 0]
    for name, owner in zero1.owners(model, 3).items():
        parts[owner] += model.get_parameter(name).numel()
    assert max(parts) / min(parts) == pytest.approx(2.2, abs=0.05)


def bucket(member: Member, settings: dict[str, Any]) -> int:
    """Bytes that a gradient of one element keeps alive under FairScale's FSDP."""
    from fairscale.internal import reduce_scatter_bucketer
    from fairscale.nn.data_parallel import FullyShardedDataParallel, fully_sharded_data_parallel

    fsdp._without_streams(fully_sharded_data_parallel)
    for module in (fully_sharded_data_parallel, reduce_scatter_bucketer):
        module.enable_nccl_base_collectives = False
    model = FullyShardedDataParallel(
        nn.Linear(member.world, 1, bias=False), compute_device=torch.device("cpu"), **settings
    )
    model(torch.ones(1, member.world)).sum().backward()
    (param,) = model.parameters()
    assert param.grad.numel() == 1
    return param.grad.untyped_storage().nbytes()


@pytest.mark.filterwarnings("ignore")
def test_a_gradient_under_fsdp_is_a_view_of_the_whole_bucket() -> None:
    warm(*preload("fairscale"))
    assert run(2, bucket, {}) == [25 * 2**20 // 2] * 2
    assert run(2, bucket, {"bucket_cap_mb": 0}) == [4, 4]


def built(member: Member, compatible: dict[str, bool]) -> bool:
    """Whether DeepSpeed compiles its all-reduce over shared memory as it starts."""
    _engine.prepare()
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    def load(builder: object) -> None:
        raise InterruptedError

    ShareMemCommBuilder.load = load
    deepspeed.ops.__compatible_ops__ = compatible or deepspeed.ops.__compatible_ops__
    try:
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    except InterruptedError:
        return True
    return False


def test_deepspeed_compiles_as_it_starts_unless_told_that_nothing_can_be() -> None:
    warm(*preload("deepspeed"))
    assert run(2, built, {"deepspeed_shm_comm": True}) == [True, True]
    assert run(2, built, {}) == [False, False]


def uncut(member: Member) -> float:
    """The weight after a step under `tp_size`, of a model that is not cut but says so; rank r wants r + 1 of it."""
    from accelerate import ParallelismConfig

    accelerator = make_accelerator(multi_device=True, parallelism_config=ParallelismConfig(tp_size=member.world))
    layer = work.linear()
    layer.tp_size = member.world
    model, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    before = layer.weight.item()
    accelerator.backward(model(torch.ones(1, 1)).sum() * (member.rank + 1))
    optimizer.step()
    return before - layer.weight.item()


def test_accelerate_takes_a_model_s_word_for_how_it_is_cut() -> None:
    warm(*preload("accelerate"))
    assert run(2, uncut) == pytest.approx([1.0, 2.0])
