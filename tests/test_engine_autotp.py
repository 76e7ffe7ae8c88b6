"""DeepSpeed's AutoTP by itself, and where its adapter differs from FairScale's: heads that do not divide."""

import functools
from typing import Any

import pytest
import torch
import world
from torch import Tensor, nn

from sandbox.config import Config
from sandbox.engines.deepspeed import _engine
from sandbox.errors import UnsupportedError
from sandbox.plan import plan, preload
from sandbox.runtime import Member, launch, warm
from sandbox.trainer import Trainer
from sandbox.verify import Case
from sandbox.verify.cases import MODEL, alone

pytestmark = [pytest.mark.parity, pytest.mark.engines]
run = functools.partial(launch, timeout=60)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    warm(*preload("deepspeed"))


class Heads(nn.Module):
    """A linear cut by rows, a scale on what is cut, as norms of heads have it, and a linear cut by columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.scale, self.down = nn.Linear(6, 8), nn.LayerNorm(4), nn.Linear(8, 6)

    def forward(self, x: Tensor, other: object = None) -> Tensor:
        return self.down(self.scale(self.up(x).unflatten(-1, (-1, 4))).flatten(-2))


def cut(member: Member, norms: bool, **settings: Any) -> tuple[Any, Heads]:
    _engine.prepare()
    import deepspeed

    model = Heads()
    specs: list[dict[str, Any]] = [
        {"patterns": [r"up\.weight$"], "partition_type": "column"},
        {"patterns": [r"down\.weight$"], "partition_type": "row"},
    ]
    if norms:
        specs.append({"patterns": [r"scale\..*$"], "partition_type": "skip", "grad_allreduce": True})
    partition = {"use_default_specs": False, "layer_specs": specs}
    config = _engine.settings(Config(), {"stage": 0}) | settings | {"gradient_accumulation_steps": 1}
    config["tensor_parallel"] = {"autotp_size": member.world, "partition_config": partition}
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=inner, dist_init_required=False, config=config)
    return engine, model


def scale_gradient(member: Member, norms: bool) -> tuple[float, float]:
    """How far the gradient of the scale is from the whole model's, and that of a linear that is cut."""
    whole, x = Heads(), torch.arange(30.0).view(5, 6).sin()
    whole(x).square().sum().backward()
    engine, model = cut(member, norms)
    engine.backward(engine(x).square().sum())
    own = whole.up.weight.grad.chunk(member.world)[member.rank]
    expected = whole.scale.weight.grad
    return (
        (model.scale.weight.grad - expected).norm().item() / expected.norm().item(),
        (model.up.weight.grad - own).norm().item() / own.norm().item(),
    )


def test_gradients_of_what_is_between_the_linears_are_summed_only_if_told() -> None:
    assert all(scale < 1e-5 and linear < 1e-5 for scale, linear in run(2, scale_gradient, True))
    assert all(scale > 0.1 and linear < 1e-5 for scale, linear in run(2, scale_gradient, False))


def clipped(member: Member) -> tuple[float, Tensor]:
    """Norm of all that a step of rate 1 has changed, clipped to 1; each cut element counted once."""
    engine, model = cut(member, True, gradient_clipping=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.backward(engine(torch.arange(30.0).view(5, 6).sin()).square().sum())
    engine.step()
    moved = {name: (p.detach() - before[name]).square().sum().item() for name, p in model.named_parameters()}
    shared = sum(square for name, square in moved.items() if "scale" in name or name == "down.bias")
    return shared, sum(moved.values()) - shared


def test_stage_0_clips_by_the_norm_over_all_parts() -> None:
    (shared, first), (again, second) = run(2, clipped)
    assert shared == pytest.approx(again)
    assert shared + first + second == pytest.approx(1.0, rel=1e-4)


def checks_inputs(member: Member) -> str:
    engine, _ = cut(member, True)
    try:
        engine(torch.ones(5, 6), object())
    except AssertionError as error:
        return str(error)
    return ""


def test_the_first_batch_is_compared_over_ranks_which_only_tensors_pass() -> None:
    assert any("Data inconsistency within the TP group" in error for error in run(2, checks_inputs))


def test_attention_is_cut_by_key_value_heads_that_need_not_divide() -> None:
    model = MODEL.model_copy(update={"heads": 6, "kv_heads": 3})
    verdict = world.verifier().verify(alone("deepspeed", "tensor", 2, "uneven heads", model=model))
    assert verdict.status == "held", verdict.cause


def unsummed(trainer: Trainer) -> None:
    """Norms of heads keep the gradient of the own heads."""
    for name, param in trainer.program.parameters.items():
        if "_norm." in name:
            param._backward_hooks.clear()


def test_a_norm_of_heads_that_is_not_summed_is_found() -> None:
    verdict = world.verifier().verify(Case(alone("deepspeed", "tensor", 2, "").config, unsummed))
    assert verdict.status == "mismatch"


def test_no_rank_is_left_without_a_head() -> None:
    with pytest.raises(UnsupportedError, match=r"mesh\.tp\.degree 3 is more than model\.kv_heads 2"):
        plan(alone("deepspeed", "tensor", 3, "").config)
