"""The mixture of experts against a plain loop over tokens, its losses against their formulas and finite differences."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sandbox.batch import IGNORED, Batch
from sandbox.config import Config, Model, check
from sandbox.errors import ConfigError
from sandbox.mesh import Mesh
from sandbox.model import MoE, build, initial, mixtures, routing_losses
from sandbox.plan import plan
from sandbox.program import make_optimizer, unsharded
from sandbox.verify.cases import alone

pytestmark = pytest.mark.unit

SMALL = Model(layers=2, width=12, heads=2, hidden=7, bias=True, init="rough", experts=5, aux_loss=0.7, z_loss=0.2)
CONFIGS = {
    "swiglu, 2 of 5": SMALL,
    "gelu, 2 of 5, weights as they are": SMALL.model_copy(update={"mlp": "gelu", "renormalise": False}),
    "1 of 4": SMALL.model_copy(update={"experts": 4, "top_k": 1, "renormalise": False, "bias": False}),
    "all of 3": SMALL.model_copy(update={"experts": 3, "top_k": 3}),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def ready(config: Model) -> MoE:
    moe = MoE(config, torch.float64)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            parameter.copy_(initial(f"blocks.0.mlp.{name}", parameter.shape, config, 0, torch.float64))
    return moe


def ragged(rows: int = 3, columns: int = 6) -> tuple[Tensor, Batch]:
    """Hidden states and their batch: the first row without a target, in the others some."""
    draw = torch.Generator().manual_seed(1)
    targets = torch.randint(9, (rows, columns), generator=draw)
    targets[torch.rand(rows, columns, generator=draw) < 0.3] = IGNORED
    targets[0] = IGNORED
    zeros = torch.zeros_like(targets)
    batch = Batch(zeros, targets, zeros, zeros, torch.arange(rows), torch.arange(columns), key=0)
    return torch.randn(rows, columns, 12, generator=draw, dtype=torch.float64), batch


def linear(expert: nn.Module, name: str, x: Tensor) -> Tensor:
    parameters = dict(expert.named_parameters())
    return parameters[f"{name}.weight"] @ x + parameters.get(f"{name}.bias", torch.zeros(()))


def by_token(moe: MoE, config: Model, x: Tensor) -> Tensor:
    """Each token through each of its experts, one by one."""
    said = []
    for token in x.view(-1, 12):
        gates = torch.softmax(moe.router.weight @ token, 0)
        chosen = sorted(range(config.experts), key=lambda i: -gates[i].item())[: config.top_k]
        total = sum(gates[i] for i in chosen) if config.renormalise else 1
        y = torch.zeros_like(token)
        for number in chosen:
            expert = moe.experts[str(number)]
            up = linear(expert, "up", token)
            hidden = F.gelu(up) if config.mlp == "gelu" else F.silu(linear(expert, "gate", token)) * up
            y = y + gates[number] / total * linear(expert, "down", hidden)
        said.append(y)
    return torch.stack(said).view_as(x)


@EACH
def test_a_dropless_mixture_is_a_loop_over_tokens(config: Model) -> None:
    moe, (x, batch) = ready(config).eval(), ragged()
    weight = torch.randn_like(x)
    parameters = [x.requires_grad_(), *moe.parameters()]
    found, expected = moe(x, batch), by_token(moe, config, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    pairs = (torch.autograd.grad((out * weight).sum(), parameters) for out in (found, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def formula(moe: MoE, config: Model, x: Tensor, targets: Tensor) -> tuple[float, float]:
    """Balance and z, summed over valid tokens, in plain numbers."""
    balance = z = 0.0
    for row, wanted in zip(x, targets, strict=True):
        valid = [moe.router.weight @ token for token, target in zip(row, wanted, strict=True) if target != IGNORED]
        counts = torch.zeros(config.experts)
        for logits in valid:
            counts[logits.topk(config.top_k).indices] += 1
        for logits in valid:
            shares = counts / (config.top_k * len(valid))
            balance += config.experts * (shares * logits.softmax(0)).sum().item()
            z += logits.exp().sum().log().item() ** 2
    return balance, z


@EACH
def test_losses_are_their_formulas_and_only_of_valid_tokens(config: Model) -> None:
    moe, (x, batch) = ready(config), ragged()
    moe(x, batch)
    balance, z = formula(moe, config, x, batch.targets)
    assert moe.loss is not None
    assert moe.loss.item() == pytest.approx(0.7 * balance + 0.2 * z, rel=1e-6)


def test_losses_of_rows_and_of_columns_add_up() -> None:
    moe, (x, batch) = ready(SMALL), ragged()
    moe(x, batch)
    (whole,) = routing_losses(moe)
    rows = []
    for part in batch.split_rows(3):
        moe(x[part.rows], part)
        rows += routing_losses(moe)
    torch.testing.assert_close(sum(rows), whole, rtol=1e-14, atol=0)
    counts, cut = [], [slice(0, 2), slice(2, 6)]
    moe.across = lambda mine: counts.append(mine) or mine  # type: ignore[func-returns-value]
    for columns in cut:
        moe(x[:, columns], batch.take_columns(columns))
    moe.across = lambda mine: counts[0] + counts[1]
    found = []
    for columns in cut:
        moe(x[:, columns], batch.take_columns(columns))
        found += routing_losses(moe)
    torch.testing.assert_close(sum(found), whole, rtol=1e-14, atol=0)


def test_balance_is_1_if_all_is_even_and_experts_over_top_k_at_worst() -> None:
    config = SMALL.model_copy(update={"experts": 4, "top_k": 1, "renormalise": False, "aux_loss": 1.0, "z_loss": 0.0})
    moe, (x, batch) = ready(config), ragged(1, 4)
    batch.targets.zero_()
    x.zero_()[0, :, :4] = torch.eye(4)
    with torch.no_grad():
        moe.router.weight.zero_()[:, :4] = 40 * torch.eye(4)
    moe(x, batch)
    assert routing_losses(moe)[0].item() == pytest.approx(1.0 * 4)  # a sum over four tokens
    x.zero_()[0, :, 0] = 1
    moe(x, batch)
    assert routing_losses(moe)[0].item() == pytest.approx(4.0 * 4)


@EACH
def test_gradients_are_finite_differences(config: Model) -> None:
    moe, (x, batch) = ready(config), ragged()
    weight = torch.randn_like(x)

    def loss() -> Tensor:
        out = (moe(x, batch) * weight).sum()
        return out + routing_losses(moe)[0]

    for parameter in (x.requires_grad_(), moe.router.weight, moe.experts["0"].down.weight):
        direction = torch.randn_like(parameter)
        (grad,) = torch.autograd.grad(loss(), parameter)
        ends = []
        for step in (1e-6, -1e-6):  # small enough to choose the same experts
            with torch.no_grad():
                parameter.add_(step * direction)
                ends.append(loss().item())
                parameter.sub_(step * direction)
        assert (grad * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-8)


def test_experts_without_a_token_have_gradient_zero_and_not_none() -> None:
    moe, (x, batch) = ready(SMALL), ragged()
    moe.router.register_forward_hook(lambda module, args, out: out - torch.tensor([0, 0, 1e3, 1e3, 1e3]))
    moe(x, batch).sum().backward()
    for number, expert in moe.experts.items():
        grads = [parameter.grad for parameter in expert.parameters()]
        assert all(grad is not None and bool(grad.any()) == (int(number) < 2) for grad in grads)


def test_losses_are_there_in_training_only_and_taken_once() -> None:
    model = nn.ModuleList([ready(SMALL), ready(SMALL)])
    x, batch = ragged()
    for moe in mixtures(model):
        moe(x, batch)
    assert len(routing_losses(model)) == 2
    assert routing_losses(model) == []
    model.eval()
    for moe in mixtures(model):
        moe(x, batch)
    assert routing_losses(model) == []


@pytest.mark.parametrize(("every", "mixed"), [(1, [0, 1, 2]), (2, [1]), (3, [2])])
def test_the_last_of_every_so_many_layers_has_experts(every: int, mixed: list[int]) -> None:
    model = build(SMALL.model_copy(update={"layers": 3, "moe_every": every}), "float32")
    assert [n for n in range(3) if isinstance(model.get_submodule(f"blocks.{n}.mlp"), MoE)] == mixed
    assert len({name for name, _ in model.named_parameters()}) == len(list(model.parameters()))


def test_biases_of_experts_do_not_decay() -> None:
    config = alone("native", "expert", 2, "").config.reference()
    program = unsharded(config, Mesh(config.mesh.degrees), torch.device("cpu"))
    decaying, plain = (group["params"] for group in make_optimizer(program, fused=False).param_groups)
    assert {p.ndim for p in decaying} == {2}
    assert {p.ndim for p in plain} == {1}


def wrong() -> Iterator[tuple[dict[str, object], str]]:
    experts = {"experts": 4}
    yield {"model": experts | {"top_k": 5}}, "model.top_k 5 is more than model.experts 4. Set model.top_k: 4."
    yield (
        {"model": experts | {"top_k": 1}},
        "model.top_k 1 with model.renormalise makes every gate weight 1, and the router has no gradient of the loss. "
        "Set model.renormalise: false, or model.top_k: 2.",
    )
    yield (
        {"model": experts | {"moe_every": 3}},
        "model.moe_every 3 is more than model.layers 2: no layer has experts. Set model.moe_every: 2.",
    )
    yield (
        {"model": experts, "mesh": {"dp": {"degree": 4, "replicas": 2}, "ep": {"degree": 4}}},
        "mesh.ep.degree 4 does not divide mesh.dp.degree / mesh.dp.replicas 2: experts are cut over data ranks. "
        "Those that do: 1, 2.",
    )
    yield (
        {"model": experts, "mesh": {"dp": {"degree": 5}, "ep": {"degree": 5}}},
        "mesh.ep.degree 5 is more than model.experts 4. Set model.experts: 5, or mesh.ep.degree: 1.",
    )
    yield (
        {"mesh": {"dp": {"degree": 2}, "ep": {"degree": 2}}},
        "mesh.ep.degree 2 is more than model.experts 0. Set model.experts: 2, or mesh.ep.degree: 1.",
    )
    yield (
        {"model": experts, "engine": "torch", "mesh": {"dp": {"degree": 2}, "ep": {"degree": 2}}},
        "engine torch cannot run expert: torch.distributed has no layer that deals experts out",
    )


@pytest.mark.parametrize(("tree", "message"), list(wrong()))
def test_settings_at_odds_are_refused_before_start(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(check(Config, tree))
    assert str(error.value).startswith(message)
