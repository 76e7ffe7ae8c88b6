"""What a library lacks, and an engine gives as the reason, it still lacks."""

import dataclasses
import functools
import re
from pathlib import Path

import library_work as work
import pytest
import torch
from torch import Tensor, nn

from sandbox.config import Config, Train
from sandbox.engines.deepspeed import _engine
from sandbox.errors import UnsupportedError
from sandbox.plan import find, plan, preload, unsupported
from sandbox.runtime import Member, launch, warm
from sandbox.verify.cases import EXPERTS, alone

pytestmark = [pytest.mark.parity, pytest.mark.engines]
run = functools.partial(launch, timeout=60)


def test_torch_deals_out_no_experts() -> None:
    sources = [file.read_text() for file in Path(torch.distributed.__path__[0]).rglob("*.py")]
    assert len(sources) > 100
    assert not [name for text in sources for name in re.findall(r"class (\w*(?:Expert|MoE)\w*)", text)]
    assert "expert" in unsupported("torch")


def test_accelerate_has_no_axis_of_experts() -> None:
    from accelerate import ParallelismConfig

    sizes = {field.name for field in dataclasses.fields(ParallelismConfig) if field.name.endswith("_size")}
    assert sizes == {"dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size"}
    assert "expert" in unsupported("accelerate")


def test_fairscale_s_gate_drops_tokens_and_draws_the_second_expert_by_chance() -> None:
    from fairscale.nn.moe.top2gate import top2gating

    logits = torch.zeros(8, 4)
    logits[:, 0] = 9.0  # all want the first expert, which takes 2 / 4 of them
    torch.manual_seed(0)
    _, weights, sent = top2gating(logits)
    assert weights.shape == (8, 4, 4)
    assert sent[:, 0].any(-1).tolist() == [True] * 4 + [False] * 4
    again = torch.stack([top2gating(logits)[2].any(-1) for _ in range(8)])
    assert (again != again[:1]).any()
    assert "expert" in unsupported("fairscale")


def balance(member: Member) -> tuple[float, float]:
    """DeepSpeed's loss of a router without drops or chance: of eight tokens, and the mean over both halves."""
    from deepspeed.moe.sharded_moe import TopKGate

    torch.manual_seed(0)
    gate = TopKGate(6, 4, k=2, drop_tokens=False, top2_2nd_expert_sampling=False)
    tokens = torch.randn(8, 6)

    def loss(some: Tensor) -> float:
        return float(gate(some)[0])

    return loss(tokens), (loss(tokens[:4]) + loss(tokens[4:])) / 2


def test_deepspeed_s_load_balance_depends_on_how_rows_are_cut() -> None:
    warm(*preload("deepspeed"))
    ((whole, halves),) = run(1, balance)
    assert abs(whole - halves) > 1e-3 * whole
    assert "expert" in unsupported("deepspeed")


def pipelined(member: Member, dtype: torch.dtype) -> str:
    """What DeepSpeed's pipeline says of a training in `dtype`, or nothing."""
    _engine.prepare()
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    layers = [LayerSpec(nn.Linear, 3, 3, dtype=dtype)] * member.world
    config = _engine.settings(Config(), {"stage": 0}) | {"steps_per_print": None}
    config |= {"bf16": {"enabled": dtype == torch.bfloat16}, "train_micro_batch_size_per_gpu": 1}
    try:
        model = PipelineModule(layers, member.world, loss_fn=nn.functional.mse_loss, partition_method="uniform")
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=inner, dist_init_required=False, config=config)
        engine.train_batch(iter([(torch.ones(1, 3, dtype=dtype), torch.zeros(1, 3, dtype=dtype))] * 2))
    except (AssertionError, NotImplementedError) as error:
        return str(error)
    return ""


def test_deepspeed_s_pipeline_has_neither_float64_nor_bfloat16_with_accumulation_in_float32() -> None:
    warm(*preload("deepspeed"))
    assert run(2, pipelined, torch.float32) == ["", ""]
    assert all("unsupported grad type: torch.float64" in error for error in run(2, pipelined, torch.float64))
    assert all("unsupported mix" in error for error in run(2, pipelined, torch.bfloat16))
    assert set(find("deepspeed", "pipeline").REFUSES) == {"float64", "bfloat16"}


def stage_that_is_asked(member: Member) -> int:
    """How often DeepSpeed's pipeline asks this rank for a loss, in a step of two microbatches."""
    _engine.prepare()
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    asked = []

    def loss(out: Tensor, target: Tensor) -> Tensor:
        asked.append(out)
        return (out - target).square().mean()

    layers = [LayerSpec(nn.Linear, 3, 3)] * member.world
    model = PipelineModule(layers, member.world, loss_fn=loss, partition_method="uniform")
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    config = _engine.settings(Config(train=Train(microbatches=2)), {"stage": 0}) | {"steps_per_print": None}
    engine, *_ = deepspeed.initialize(model=model, optimizer=inner, dist_init_required=False, config=config)
    engine.train_batch(iter([(torch.ones(1, 3), torch.zeros(1, 3))] * 2))
    return len(asked)


def test_deepspeed_s_pipeline_takes_the_loss_of_the_last_stage_alone() -> None:
    warm(*preload("deepspeed"))
    assert run(3, stage_that_is_asked) == [0, 0, 2]
    with pytest.raises(UnsupportedError, match=r"model\.experts: DeepSpeed's pipeline takes the loss of the last"):
        plan(alone("deepspeed", "pipeline", 2, "", model=EXPERTS).config)


def test_deepspeed_cuts_parameters_in_ranges_and_not_by_rows() -> None:
    warm(*preload("deepspeed"))
    assert run(2, part_of_a_matrix) == [(8,), (8,)]  # of 5 rows of 3, padded
    assert "fsdp" in unsupported("deepspeed")


def part_of_a_matrix(member: Member) -> tuple[int, ...]:
    _, layer, _ = work.deepspeed_engine(member, 3, torch.float32)
    return tuple(layer.weight.ds_tensor.shape)


def test_deepspeed_has_no_replicas_any_more() -> None:
    """MiCS was ZeRO-3 within groups of ranks; what is left, hpZ, cuts the optimizer over all ranks."""
    warm(*preload("deepspeed"))
    assert all("MiCS ZeRO-3 sharding has been removed" in error for error in run(2, in_groups))
    for name in ("zero1", "zero2", "zero3"):
        with pytest.raises(UnsupportedError, match=r"mesh\.dp\.replicas: 1"):
            plan(alone("deepspeed", name, 4, "", {"replicas": 2}).config)


def in_groups(member: Member) -> str:
    try:
        work.deepspeed_engine(member, 3, torch.float32, zero_optimization={"stage": 3, "mics_shard_size": 1})
    except Exception as error:
        return str(error)
    return ""


def test_fairscale_s_layers_multiply_in_the_dtype_of_their_weights() -> None:
    warm(*preload("fairscale"))
    assert all("same dtype" in error for error in run(2, of_bfloat16))
    assert set(find("fairscale", "tensor").REFUSES) == {"bfloat16"}


def of_bfloat16(member: Member) -> str:
    from fairscale.nn.model_parallel import initialize
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear

    initialize.initialize_model_parallel(member.world)
    try:
        ColumnParallelLinear(4, 4, init_method=torch.zero_)(torch.ones(1, 4, dtype=torch.bfloat16))
    except RuntimeError as error:
        return str(error)
    return ""
