"""What a library lacks, and an engine gives as the reason, it still lacks."""

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sandbox.plan import preload, unsupported
from sandbox.runtime import Member, launch, warm

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
