"""Libraries on several axes at once: what goes together only if told how, what does not, and that a slip is found."""

import functools
import inspect
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import library_work as work
import pytest
import torch
import torch.distributed as dist
import world
from torch import Tensor, nn

from sandbox.config import Config, Data
from sandbox.engines.accelerate._accelerator import asked_of_transformers, make_accelerator
from sandbox.engines.deepspeed import _engine
from sandbox.errors import UnsupportedError
from sandbox.plan import plan, preload
from sandbox.runtime import Member, launch, warm
from sandbox.trainer import Trainer
from sandbox.verify import Case
from sandbox.verify.cases import EVEN, MANY, MODEL, alone

pytestmark = [pytest.mark.parity, pytest.mark.engines]
run = functools.partial(launch, timeout=60)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    warm(*preload("accelerate"), *preload("deepspeed"), *preload("fairscale"))


def beside(engine: str, strategy: str, **settings: Any) -> Case:
    """Tensor parallelism on two ranks, and another strategy of dp on two."""
    return alone(engine, "tensor", 2, "", beside={"dp": {"degree": 2, "strategy": strategy}}, **settings)


# Accelerate


def test_a_parallelism_config_has_no_tensor_parallelism_with_ddp() -> None:
    from accelerate import ParallelismConfig

    with pytest.raises(ValueError, match=r"cannot be used with pure data parallelism \(dp_replicate_size > 1"):
        ParallelismConfig(dp_replicate_size=2, tp_size=2)
    assert ParallelismConfig(dp_replicate_size=2, dp_shard_size=2, tp_size=2).total_size == 8
    with pytest.raises(UnsupportedError, match=r"refuses a ParallelismConfig .* Set mesh\.dp\.strategy: fsdp"):
        plan(beside("accelerate", "ddp").config)


def over_tp(member: Member, supplied: bool) -> str:
    """What Accelerate says when FSDP is to cut what torch has cut over tp."""
    from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False)
    accelerator = make_accelerator(
        multi_device=True, fsdp_plugin=plugin, parallelism_config=ParallelismConfig(dp_shard_size=2, tp_size=2)
    )
    model: Any = nn.Sequential(nn.Linear(4, 4))
    parallelize_module(model, accelerator.torch_device_mesh["tp"], {"0": ColwiseParallel()})
    try:
        with asked_of_transformers() if supplied else nullcontext():
            model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    except ImportError as error:
        return str(error)
    return str(tuple(model[0].weight.to_local().shape))


def test_accelerate_asks_transformers_for_a_name_that_it_has_no_more() -> None:
    assert all("cannot import name 'ReplicateParallel'" in error for error in run(4, over_tp, False))
    assert run(4, over_tp, True) == ["(1, 4)"] * 4


def weighs_more(trainer: Trainer) -> None:
    """Tokens of the second data rank count a little more."""
    loss, scale = trainer.program.loss, 1 + 1e-9 * trainer.mesh.data.rank
    trainer.program = replace(trainer.program, loss=lambda logits, targets: loss(logits, targets) * scale)


def test_a_data_rank_that_weighs_a_billionth_more_is_found_over_tp() -> None:
    verdict = world.verifier().verify(Case(beside("accelerate", "fsdp").config, weighs_more))
    assert verdict.status == "mismatch"


def test_the_deepspeed_plugin_has_no_sequence_parallelism_to_cut_by() -> None:
    case = alone("accelerate", "tensor", 2, "", {"sequence": True}, beside={"dp": {"degree": 2, "strategy": "zero1"}})
    with pytest.raises(UnsupportedError, match=r"AutoTP, which has none of it\. Set mesh\.tp\.sequence: false"):
        plan(case.config)


# DeepSpeed


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(x)
        return out


def stages_cut_over_tp(member: Member) -> bool:
    """Whether a pipeline of two stages, each for two ranks of AutoTP, stops over how many data ranks there are."""
    _engine.prepare()
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from deepspeed.utils import groups

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model = PipelineModule(
        [LayerSpec(Up)] * 2,
        topology=PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1),
        loss_fn=nn.functional.mse_loss,
        partition_method="uniform",
    )
    specs = [{"patterns": [r".*up\.weight$"], "partition_type": "column"}]
    partition = {"use_default_specs": False, "layer_specs": specs}
    config = _engine.settings(Config(), {"stage": 0}) | {"steps_per_print": None}
    config |= {"tensor_parallel": {"autotp_size": 2, "partition_config": partition}}
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    try:
        deepspeed.initialize(model=model, optimizer=inner, dist_init_required=False, config=config)
    except AssertionError:
        ranks = dist.get_process_group_ranks(groups.get_data_parallel_group())
        return ranks == [member.rank % 2, member.rank % 2 + 2]  # those of the other stage
    return False


def test_autotp_takes_stages_for_data_ranks() -> None:
    assert run(4, stages_cut_over_tp) == [True] * 4
    case = alone("deepspeed", "tensor", 2, "", beside={"pp": {"degree": 2, "strategy": "pipeline"}}, model=MANY)
    with pytest.raises(UnsupportedError, match=r"stages too\. Set mesh\.pp\.degree: 1"):
        plan(case.config)


def heads_that_do_not_divide(count: int) -> dict[str, Any]:
    return {"model": MODEL.model_copy(update={"heads": 2 * count, "kv_heads": count})}


def test_ulysses_deals_out_heads_that_do_not_divide() -> None:
    case = alone("deepspeed", "context", 2, "", **heads_that_do_not_divide(3), train={"recompute": "full"})
    verdict = world.verifier().verify(case)
    assert verdict.status == "held", verdict.cause


def rank_in_ulysses(member: Member) -> int:
    _engine.prepare()
    from deepspeed.sequence import layer

    assert "groups._get_sequence_parallel_rank()" in inspect.getsource(layer.uneven_heads_all2all)
    return int(layer.groups._get_sequence_parallel_rank())


def test_given_a_group_every_rank_of_ulysses_takes_itself_for_the_first_unless_told() -> None:
    assert run(2, rank_in_ulysses) == [0, 0]


def exchanged(member: Member, columns: int, heads: int, scatter: int, gather: int) -> str:
    """What Ulysses says of an exchange of columns for heads, or of heads for columns."""
    _engine.prepare()
    import deepspeed
    from deepspeed.sequence.layer import single_all_to_all

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    try:
        single_all_to_all(torch.ones(1, columns, heads, 2), scatter, gather, 0, dist.group.WORLD)
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return ""


def test_ulysses_wants_a_key_value_head_for_each_rank_and_columns_that_divide() -> None:
    assert run(2, exchanged, 4, 2, 2, 1) == ["", ""]
    assert all("leaves a rank with no head to attend over" in error for error in run(2, exchanged, 4, 1, 2, 1))
    assert all("is invalid for input of size" in error for error in run(2, exchanged, 5, 2, 1, 2))
    for settings, text in (
        (heads_that_do_not_divide(1), r"more than model\.kv_heads 1"),
        ({"data": Data(sequence=23)}, r"does not divide data\.sequence 23"),
    ):
        with pytest.raises(UnsupportedError, match=text):
            plan(alone("deepspeed", "context", 2, "", **settings).config)
    with pytest.raises(UnsupportedError, match="more than the key/value heads of a rank of tp, 1"):
        plan(alone("deepspeed", "context", 2, "", beside={"tp": {"degree": 2}}).config)


# FairScale


def in_a_group(member: Member, told: bool) -> list[bool]:
    """Which gradients this rank has left after ShardedDDP over every second rank; each owns one of two."""
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim import OSS

    pairs = [dist.new_group([first, first + 2]) for first in (0, 1)]
    group, rank = pairs[member.rank % 2], member.rank // 2
    layers = nn.Sequential(work.linear(), work.linear())
    oss = OSS(layers.parameters(), torch.optim.SGD, group=group, lr=0.0)
    model = ShardedDataParallel(layers, oss, group, reduce_buffer_size=0)
    if told:
        model._global_rank = rank
    model(torch.ones(1, 1)).sum().backward()
    return [layers[owner].weight.grad is not None for owner in (0, 1)]


@pytest.mark.filterwarnings("ignore")
def test_an_owner_drops_its_gradient_if_its_group_is_not_the_world() -> None:
    first, second = [True, False], [False, True]
    assert run(4, in_a_group, True) == [first, first, second, second]
    kept = run(4, in_a_group, False)
    assert kept != [first, first, second, second]
    assert kept[3] == [False, False]


def unsummed(trainer: Trainer) -> None:
    """Norms of heads keep the gradient of the own heads."""
    for name, module in trainer.program.model.named_modules():
        if name.endswith("_norm"):
            module.forward = functools.partial(type(module).forward, module)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "fsdp"])
def test_a_norm_of_heads_that_is_not_summed_is_found(strategy: str) -> None:
    verdict = world.verifier().verify(Case(beside("fairscale", strategy, model=EVEN).config, unsummed))
    assert verdict.status == "mismatch"
