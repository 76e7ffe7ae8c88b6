"""Stages, weights' gradients put off, refusals; then worlds of every schedule against the unsharded run."""

import importlib
from typing import Any

import pipeline_work as work
import pytest
import torch
import world
from torch import nn

from sandbox.batch import Batch
from sandbox.config import Config, Data, Mesh, Model, Train
from sandbox.model import Transformer, build, initial, loss_sum
from sandbox.plan import predict
from sandbox.program import replace_parameters
from sandbox.runtime import launch
from sandbox.schedules import SCHEDULES, peaks
from sandbox.stages import WeightsLater, completed, cut, keep, view
from sandbox.verify import Case, Verdict
from sandbox.verify.cases import MODEL, TIED, case

pipeline = importlib.import_module("sandbox.strategies.pipeline")

UNIT, PARITY = pytest.mark.unit, pytest.mark.parity
EACH = pytest.mark.parametrize("schedule", SCHEDULES)
DEEP = MODEL.model_copy(update={"layers": 6})


def config(degree: int = 2, layers: int = 3, microbatches: int = 3, **options: Any) -> Config:
    return Config(
        mesh=Mesh.model_validate({"pp": {"degree": degree, **options}}),
        model=MODEL.model_copy(update={"layers": layers, "init": "rough"}),
        data=Data(sequence=24, mask="ragged"),
        train=Train(batch=13, microbatches=microbatches, dtype="float64"),
    )


def real(model: Model, dtype: str = "float64") -> Transformer:
    """A model with values."""
    built = build(model, dtype)
    own = torch.float64 if dtype == "float64" else torch.float32
    values = {n: nn.Parameter(initial(n, p.shape, model, 0, own)) for n, p in built.named_parameters()}
    replace_parameters(built, values)
    return built.train()


def batch(rows: int = 3, columns: int = 7) -> Batch:
    tokens = torch.randint(257, (rows, columns + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(columns).expand(rows, -1)
    return Batch(
        tokens[:, :-1], tokens[:, 1:], positions, 0 * positions, torch.arange(rows), torch.arange(columns), key=3
    )


# Stages


@UNIT
@pytest.mark.parametrize(("layers", "stages"), [(3, 2), (3, 5), (6, 4), (2, 3), (1, 3), (9, 4)])
@pytest.mark.parametrize("by", ["layers", "parameters"])
def test_stages_are_all_parts_in_order_and_none_is_empty(layers: int, stages: int, by: str) -> None:
    found = cut(build(MODEL.model_copy(update={"layers": layers}), "float32"), stages, by)
    assert [name for stage in found for name in stage] == ["embed", *map(str, range(layers)), "head"]
    assert len(found) == stages
    assert all(found)
    if by == "layers":
        assert max(map(len, found)) - min(map(len, found)) <= 1


@UNIT
def test_cutting_by_parameters_gives_a_large_embedding_a_stage_of_its_own() -> None:
    wide = MODEL.model_copy(update={"layers": 4, "vocab": 5000})
    assert cut(build(wide, "float32"), 3, "parameters") == [("embed",), ("0", "1", "2", "3"), ("head",)]
    assert cut(build(wide, "float32"), 3, "layers") == [("embed", "0"), ("1", "2"), ("3", "head")]


@UNIT
@pytest.mark.parametrize("model", [MODEL, TIED], ids=["", "tied"])
def test_stages_one_after_the_other_are_the_model(model: Model) -> None:
    whole, given = real(model), batch()
    views = [view(whole, stage) for stage in cut(whole, 3, "layers")]
    hidden = None
    for stage in views:
        hidden = stage(given, hidden)
    assert hidden is not None
    assert torch.equal(hidden, whole(given))
    assert {p for stage in views for p in stage.parameters()} == set(whole.parameters())
    assert whole.embed is not None, "a view leaves the model alone"
    assert len(whole.blocks) == model.layers


@UNIT
def test_a_rank_keeps_the_parts_of_its_stages_under_their_names() -> None:
    model = build(DEEP, "float32")
    names = [name for name, _ in model.named_parameters()]
    stages = cut(model, 4, "layers")
    keep(model, [stages[1], stages[3]])
    kept = [name for name, _ in model.named_parameters()]
    prefixes = tuple(f"blocks.{key}." for key in (*stages[1], *stages[3]) if key.isdigit())
    assert kept == [name for name in names if name.startswith((*prefixes, "norm", "head"))]


@UNIT
def test_a_tied_head_keeps_the_embedding_for_its_name() -> None:
    model = build(TIED, "float32")
    keep(model, [("1", "head")])
    assert next(name for name, _ in model.named_parameters()) == "embed.weight"
    assert view(model, ("1", "head")).embed is None


@UNIT
def test_a_gradient_is_complete_with_the_last_action_that_adds_to_it() -> None:
    model = build(TIED, "float32")
    first, last = view(model, ("embed", "0")), view(model, ("1", "head"))
    found = completed(model, [first, last, last, first], besides=None)
    assert found[3][-1] == "embed.weight", "which both use"
    assert {name for name in found[2] if "blocks" in name} == {n for n, _ in model.named_parameters() if "s.1." in n}
    assert not found[0] + found[1]
    besides = completed(model, [first, last], besides="embed.weight")
    assert not any("embed.weight" in names for names in besides.values())


# Weights later


@UNIT
@pytest.mark.parametrize("model", [MODEL, TIED], ids=["", "tied"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_gradients_of_weights_that_come_later_are_the_same(model: Model, dtype: str) -> None:
    at_once, later, given = real(model, dtype), real(model, dtype), batch()
    loss_sum(at_once(given), given.targets).backward()
    with WeightsLater() as late:
        out = later(given)
    loss_sum(out, given.targets).backward()
    linears = {f"{n}.weight" for n, module in later.named_modules() if isinstance(module, nn.Linear)}
    waiting = {name for name, p in later.named_parameters() if p.grad is None}
    assert waiting == linears - {"head.weight" if model.tied else ""}, "all matrices wait, and nothing else"
    late.run()
    tolerance = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for (name, one), two in zip(at_once.named_parameters(), later.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert (one.grad - two.grad).abs().max() <= tolerance * max(1.0, one.grad.abs().max().item()), name


@UNIT
def test_a_weight_that_others_share_a_function_with_does_not_wait() -> None:
    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    x = torch.randn(3, 4, requires_grad=True)
    together = torch.cat(weights)
    with WeightsLater() as late:
        out = nn.functional.linear(x, together)
    out.sum().backward()
    assert all(weight.grad is not None for weight in weights)
    late.run()
    assert x.grad is not None


@UNIT
def test_without_gradients_nothing_is_put_off() -> None:
    model, given = real(MODEL), batch()
    with WeightsLater() as late, torch.no_grad():
        model(given)
    assert not late._late


@UNIT
def test_the_options_name_every_schedule() -> None:
    assert pipeline.Options.model_fields["schedule"].annotation.__args__ == SCHEDULES


# Predictions


@UNIT
def test_predicted_bytes_are_what_the_docstring_says() -> None:
    x = 13 * 24 * 24 * 8
    sent = [rank.traffic["send pp"] for rank in predict(config(degree=3))]
    assert sent == [x, 2 * x, x]
    assert [rank.traffic["send pp"] for rank in predict(config(schedule="zbv"))] == [2 * x, 2 * x]
    assert [rank.traffic["send pp"] for rank in predict(config(schedule="interleaved"))] == [3 * x, 3 * x]


@UNIT
def test_every_parameter_is_predicted_on_one_rank() -> None:
    whole = sum(p.numel() for p in build(config().model, "float64").parameters())
    assert sum(rank.memory["parameters"] for rank in predict(config(degree=4, schedule="1f1b"))) == 8 * whole


# Worlds


def verify(mesh: dict[str, dict[str, Any]], **settings: Any) -> Verdict:
    name = ", ".join(f"{axis} {' '.join(map(str, section.values()))}" for axis, section in mesh.items())
    verdict = world.verifier().verify(case("native", name, mesh, **settings))
    assert verdict.status == "held", verdict.cause
    return verdict


def error(verdict: Verdict) -> float:
    tensors = (*verdict.gradients, *verdict.parameters)
    return max(verdict.loss, verdict.norm, *(max(d.error, d.drift) for d in tensors))


@PARITY
@EACH
def test_four_ranks_have_parity_with_many_microbatches(schedule: str) -> None:
    mesh = {"pp": {"degree": 4, "schedule": schedule}}
    assert error(verify(mesh, model=DEEP, train={"microbatches": 9})) <= world.EXACT


@PARITY
@EACH
def test_one_microbatch_has_parity(schedule: str) -> None:
    assert (
        error(verify({"pp": {"degree": 2, "schedule": schedule}}, train={"microbatches": 1, "clip": None}))
        <= world.EXACT
    )


@PARITY
@pytest.mark.parametrize("data", ["ddp", "zero1"])
def test_a_rank_that_holds_the_tied_weight_alone_has_parity(data: str) -> None:
    mesh = {"pp": {"degree": 4}, "dp": {"degree": 2, "strategy": data}}
    assert error(verify(mesh, model=TIED)) <= world.EXACT


@PARITY
@pytest.mark.parametrize("degree", [3, 5, 8])
def test_other_degrees_have_parity(degree: int) -> None:
    assert error(verify({"pp": {"degree": degree, "cut": "parameters"}}, model=DEEP)) <= world.EXACT


@PARITY
def test_eight_ranks_have_parity() -> None:
    mesh = {"pp": {"degree": 2, "schedule": "zb_h1"}, "dp": {"degree": 4, "strategy": "ddp", "sync": "each"}}
    assert error(verify(mesh)) <= world.EXACT


@PARITY
@pytest.mark.parametrize("data", ["ddp", "zero3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrower_types_stay_within_their_noise(data: str, dtype: str) -> None:
    verify({"pp": {"degree": 2, "schedule": "zbv"}, "dp": {"degree": 2, "strategy": data}}, dtype=dtype)


@PARITY
@pytest.mark.parametrize(("schedule", "data"), [("1f1b", "ddp"), ("zbv", "fsdp"), ("interleaved", "zero3")])
def test_validation_between_steps_agrees_with_one_process(schedule: str, data: str) -> None:
    settings = config(schedule=schedule)
    mesh = settings.mesh.model_copy(update={"dp": Mesh.model_validate({"dp": {"degree": 2, "strategy": data}}).dp})
    settings = settings.model_copy(update={"mesh": mesh})
    found = launch(4, world.losses, settings, timeout=world.TIMEOUT)
    expected = launch(1, world.losses, settings.reference(), timeout=world.TIMEOUT)[0]
    for rank in found:
        assert rank == pytest.approx(expected, rel=1e-12)


@PARITY
@EACH
def test_ranks_keep_no_more_microbatches_than_the_schedule_says(schedule: str) -> None:
    settings = config(degree=2, microbatches=8, schedule=schedule)
    planned = pipeline.schedule(settings, pipeline.Options(schedule=schedule))
    assert launch(2, work.live, settings, timeout=world.TIMEOUT) == peaks(planned)


@PARITY
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "dualpipe_v"])
def test_each_gradient_is_reported_once_and_when_no_more_is_to_come(schedule: str) -> None:
    settings = config(degree=2, microbatches=5, schedule=schedule)
    planned = pipeline.schedule(settings, pipeline.Options(schedule=schedule))
    reported = launch(2, work.reports, settings, timeout=world.TIMEOUT)
    names = [name for rank in reported for name, _ in rank]
    assert sorted(names) == sorted(name for name, _ in build(settings.model, "float64").named_parameters())
    for order, rank in zip(planned.orders, reported, strict=True):
        ends = {len(order) - 1 - max(n for n, a in enumerate(order) if a.stage == s) for s in {a.stage for a in order}}
        assert {left for _, left in rank} == ends


@PARITY
def test_a_timeline_shows_every_stage() -> None:
    verdict = world.verifier(measure=True).verify(Case(case("native", "", {"pp": {"degree": 2}}).config))
    assert verdict.status == "held", verdict.cause
    assert [{"forward embed", "forward head"} & {span.name for span in rank} for rank in verdict.timeline] == [
        {"forward embed"},
        {"forward head"},
    ]
    assert all("send pp" in {span.name for span in rank} for rank in verdict.timeline)
