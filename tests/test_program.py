"""The parts of a step: the schedule, the optimizer's groups, clipping, first values, accumulation."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import world
from torch import Tensor, nn

from sandbox.config import Config, Train
from sandbox.layout import Layout
from sandbox.mesh import Mesh
from sandbox.model import initial
from sandbox.program import Program, clip, learning_rate, make_optimizer, materialise, replace_parameters, unsharded
from sandbox.runtime import Member
from sandbox.trainer import Trainer

ALONE = Mesh({"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1})
unit = pytest.mark.unit


def program_of(config: Config) -> Program:
    program = unsharded(config, ALONE, torch.device("cpu"))
    return replace(program, parameters=materialise(program))


def trainer(**sections: dict[str, Any]) -> Trainer:
    return world.trainer_of(Member(), world.config(world=1, **sections))


def rates(**settings: Any) -> list[float]:
    train = Train.model_validate({"lr": 1.0, "steps": 11, **settings})
    return [learning_rate(train, step) for step in range(train.steps)]


@unit
def test_a_constant_rate_is_constant_after_the_warm_up() -> None:
    assert rates() == [1.0] * 11
    assert rates(warmup=4) == [0.25, 0.5, 0.75] + [1.0] * 8


@unit
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_starts_at_the_rate_and_falls(schedule: str) -> None:
    found = rates(schedule=schedule, warmup=2)
    assert found[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert all(later < earlier for earlier, later in pairwise(found[2:]))


@unit
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_last_step_has_a_tenth_of_the_rate(schedule: str, warmup: int) -> None:
    assert rates(schedule=schedule, warmup=warmup)[-1] == pytest.approx(0.1)


@unit
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_warm_up_as_long_as_the_run_never_falls(schedule: str) -> None:
    assert rates(schedule=schedule, warmup=11)[-1] == 1.0


@unit
@pytest.mark.parametrize("optimizer", ["sgd", "sgd_momentum", "adamw"])
def test_weight_decay_goes_by_the_logical_tensor_not_by_the_piece(optimizer: str) -> None:
    config = world.config(world=1, train={"optimizer": optimizer, "weight_decay": 0.3})
    program = program_of(config)
    flat = replace(
        program,
        parameters={name: nn.Parameter(p.detach().flatten()) for name, p in program.parameters.items()},
        layout={name: where.range(0, where.numel, ("dp",)) for name, where in program.layout.items()},
    )
    for some in (program, flat):
        groups = make_optimizer(some).param_groups
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert len(decays) == len(some.parameters)
        for name, param in some.parameters.items():
            matrix = name.endswith("weight") and "norm" not in name
            assert decays[id(param)] == (0.3 if matrix else 0.0), name


@unit
def test_the_optimizer_leaves_out_empty_pieces() -> None:
    program = program_of(world.config(world=1))
    empty = dict.fromkeys(list(program.parameters)[:3], nn.Parameter(torch.zeros(0)))
    groups = make_optimizer(replace(program, parameters={**program.parameters, **empty})).param_groups
    assert all(p.numel() for group in groups for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(program.parameters) - 3


@unit
@pytest.mark.parametrize("most", [0.1, 7.0, 1e6, None])
def test_clipping_is_torchs(most: float | None) -> None:
    program, twin = (program_of(world.config(world=1)) for _ in range(2))
    for name, param in program.parameters.items():
        param.grad = torch.randn_like(param)
        twin.parameters[name].grad = param.grad.clone()
    norm = clip(program, most, ALONE)
    expected = nn.utils.clip_grad_norm_(twin.parameters.values(), most or torch.inf)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(expected.item(), rel=1e-14)
    assert 7.0 < expected < 1e6
    for name, param in program.parameters.items():
        assert torch.allclose(param.grad, twin.parameters[name].grad, rtol=1e-14, atol=0), name  # type: ignore[arg-type]


@unit
def test_without_gradients_the_norm_is_zero() -> None:
    assert clip(program_of(world.config(world=1)), 1.0, ALONE).item() == 0


@unit
@pytest.mark.parametrize("place", ["whole", "piece"])
def test_each_element_counts_once_in_the_norm_whoever_holds_it(place: str) -> None:
    """On paper: what the first rank of an axis counts, the others do not, unless they hold other pieces."""
    program = program_of(world.config(world=1))
    name = next(iter(program.parameters))
    param = program.parameters[name]
    param.grad = torch.ones_like(param)
    whole = program.layout[name]
    layout = whole if place == "whole" else whole.cut(0, 0, whole.shape[0], ("dp_shard",))
    degrees = {"dp_replicate": 1, "dp_shard": 2}
    norms = []
    for rank in range(2):
        mesh = Mesh(degrees, rank)
        other = Layout.whole((1,)).range(0, 1, ("nothing",))  # something here is sharded, so places are looked at
        one = replace(program, parameters={name: param}, layout={name: layout, "other": other})
        counted = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sandbox.program.all_reduce", lambda t, axis, op, c=counted: Done(c, t))
            clip(one, None, mesh)
        norms.append(counted[0])
    assert norms == pytest.approx([param.numel(), param.numel() if place == "piece" else 0])


class Done:
    """A reduction that only notes what it was given."""

    def __init__(self, counted: list[float], tensor: Tensor) -> None:
        counted.append(tensor.item())
        self.tensor = tensor

    def wait(self) -> Tensor:
        return self.tensor


@unit
@pytest.mark.parametrize("tied", [False, True])
def test_first_values_come_from_their_names_and_tied_weights_stay_tied(tied: bool) -> None:
    config = world.config(world=1, model={"tied": tied})
    program = program_of(config)
    model: Any = program.model
    assert (model.head.weight is model.embed.weight) == tied
    assert ("head.weight" in program.parameters) != tied
    for name, param in model.named_parameters():
        assert param is program.parameters[name]
        assert torch.equal(param, initial(name, param.shape, config.model, config.train.seed, torch.float64))


@unit
def test_replacing_parameters_reaches_every_place_of_a_tied_one() -> None:
    model: Any = program_of(world.config(world=1, model={"tied": True})).model
    new = nn.Parameter(torch.zeros_like(model.embed.weight))
    before = model.norm.weight
    replace_parameters(model, {"embed.weight": new})
    assert model.embed.weight is new
    assert model.head.weight is new
    assert model.norm.weight is before


@unit
def test_materialising_keeps_what_has_values_already() -> None:
    program = program_of(world.config(world=1))
    with torch.no_grad():
        program.parameters["norm.weight"].fill_(7)
    assert (materialise(program)["norm.weight"] == 7).all()


@unit
@pytest.mark.parametrize("microbatches", [2, 3, 11])
def test_microbatches_add_up_to_the_gradient_of_the_whole(microbatches: int) -> None:
    whole, cut = (trainer(train={"microbatches": count}) for count in (1, microbatches))
    losses = [one.compute_gradients(one.batch()).item() for one in (whole, cut)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-14)
    for name, param in whole.program.parameters.items():
        other = cut.program.parameters[name].grad
        assert torch.allclose(param.grad, other, rtol=0, atol=1e-14), name  # type: ignore[arg-type]


@unit
def test_each_pass_is_announced_and_finished_and_each_gradient_reported_once() -> None:
    one = trainer(train={"microbatches": 3})
    log: list[str] = []
    one.program = replace(
        one.program,
        begin=lambda final: log.append(f"begin {final}"),
        grad_ready=log.append,
        reduce_grads=lambda: log.append("reduce"),
    )
    one.compute_gradients(one.batch())
    names = sorted(one.program.parameters)
    for final in (False, False, True):
        this, log = log[: len(names) + 2], log[len(names) + 2 :]
        assert (this[0], this[-1]) == (f"begin {final}", "reduce")
        assert sorted(this[1:-1]) == names
    assert log == []


@unit
def test_a_batch_without_targets_moves_nothing_but_decay() -> None:
    one = trainer(train={"clip": None})
    batch = one.batch()
    loss = one.compute_gradients(replace(batch, targets=torch.full_like(batch.targets, -100)))
    assert loss.item() == 0
    assert one.update().item() == 0
    assert not torch.stack([p.isnan().any() for p in one.program.parameters.values()]).any()


@unit
def test_a_step_starts_from_gradient_zero_and_reports_the_rate_it_used() -> None:
    one = trainer(train={"schedule": "linear", "lr": 0.5})
    for param in one.program.parameters.values():
        param.grad = torch.full_like(param, 1e6)
    step = one.train_step()
    assert (step.step, step.lr, one.step) == (1, 0.5, 1)
    assert step.grad_norm < 1e3
    assert step.tokens_per_second > 0


@pytest.mark.parity
def test_the_norm_of_a_sharded_gradient_is_that_of_the_whole() -> None:
    """Whatever is cut or replicated, and on every rank."""
    reference = world.alone(world.config()).norms
    for strategy in world.NATIVE:
        config = world.config(strategy, 4, mesh={"replicas": 2})
        for rank in world.ranks(config):
            assert rank.norms == pytest.approx(reference, rel=world.EXACT)
