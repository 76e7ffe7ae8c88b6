"""Tensor parallelism: who holds what and what it costs, on paper; then worlds against the unsharded run."""

import importlib
from typing import Any

import pytest
import torch
import world
from torch import nn

from sandbox.batch import IGNORED
from sandbox.comm import Axis, ring_bytes
from sandbox.config import Config, Data, Model, Train
from sandbox.layout import Layout
from sandbox.mesh import Mesh
from sandbox.model import loss_sum
from sandbox.plan import predict
from sandbox.program import Program, unsharded
from sandbox.regions import share_weights, vocabulary_loss
from sandbox.runtime import launch
from sandbox.verify import Verdict
from sandbox.verify.cases import MODEL, TIED, case
from sandbox.verify.faults import FAULTS

tensor = importlib.import_module("sandbox.strategies.tensor")

UNIT, PARITY = pytest.mark.unit, pytest.mark.parity

SPLITS = [
    (heads, groups, ranks)
    for heads in (4, 6, 8)
    for groups in (1, 2, 3, 4, 8)
    for ranks in (1, 2, 3, 4, 5, 8)
    if heads % groups == 0 and ranks <= heads
]
ODD = MODEL.model_copy(update={"heads": 6, "kv_heads": 3, "mlp": "swiglu"})


def config(degree: int, model: Model = MODEL, **options: Any) -> Config:
    return Config.model_validate({"mesh": {"tp": {"degree": degree, **options}}, "model": model.model_dump()})


def on_paper(degree: int, rank: int, model: Model) -> Program:
    mesh = Mesh(config(degree).mesh.degrees, rank)
    program: Program = tensor.apply(unsharded(config(degree, model), mesh, torch.device("cpu")), mesh, tensor.Options())
    return program


@UNIT
@pytest.mark.parametrize(("heads", "groups", "ranks"), SPLITS)
def test_each_query_is_with_its_key_on_one_rank(heads: int, groups: int, ranks: int) -> None:
    model = Model(width=4 * heads, heads=heads, kv_heads=groups)
    parts = [tensor.Heads.of(model, Axis(("tp",), ranks, rank)) for rank in range(ranks)]
    assert [query for part in parts for query in part.queries] == list(range(heads))
    for rank, part in enumerate(parts):
        assert {query * groups // heads for query in part.queries} == set(part.keys)
        assert len(part.queries) % len(part.keys) == 0
        assert rank in part.holders
        assert [r for r in range(ranks) if set(parts[r].keys) & set(part.keys)] == list(part.holders)


@UNIT
@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("model", [MODEL, TIED, ODD], ids=["grouped", "tied", "odd"])
def test_each_element_is_counted_once(degree: int, model: Model) -> None:
    programs = [on_paper(degree, rank, model) for rank in range(degree)]
    for name, layout in programs[0].layout.items():
        seen = torch.zeros(layout.shape)
        for rank, program in enumerate(programs):
            mine = program.layout[name]
            assert program.parameters[name].shape == mine.local_shape
            if mine.copy == 0 and (rank == 0 or "tp" in mine.sharded):
                count = torch.zeros(layout.shape)
                mine.put(count, torch.ones(mine.local_shape))
                seen += count
        assert (seen == 1).all(), name


@UNIT
def test_tied_weights_stay_one_parameter() -> None:
    program = on_paper(3, 1, TIED)
    assert program.model.head.weight is program.model.embed.weight  # type: ignore[union-attr]
    assert program.layout["embed.weight"].offset == (88, 0)  # 264 words over 3 ranks


@UNIT
@pytest.mark.parametrize("degree", [2, 3])
def test_bytes_are_those_of_the_formulas(degree: int) -> None:
    model = Model(layers=3, width=24, heads=6, qk_norm=True)
    settings = config(degree, model).model_copy(
        update={"train": Train(batch=4, dtype="float64", optimizer="sgd"), "data": Data(sequence=12)}
    )
    hidden, pairs, norms = 4 * 12 * 24 * 8, 4 * 12 * 2 * 8, 3 * 2 * 4 * 8
    for found in predict(settings):
        assert found.traffic == {
            "all_reduce tp": (4 * 3 + 2) * ring_bytes(hidden, degree) + ring_bytes(norms, degree),
            "all_gather tp": (degree - 1) * pairs,
        }
    options = settings.mesh.tp.model_copy(update={"sequence": True})
    cut = settings.model_copy(update={"mesh": settings.mesh.model_copy(update={"tp": options})})
    norms += (3 * 2 + 1) * 24 * 8
    for found in predict(cut):
        part = (degree - 1) * hidden // degree
        assert found.traffic == {
            "all_reduce tp": ring_bytes(norms, degree),
            "all_gather tp": (4 * 3 + 2 + 2 * 3 + 1) * part + (degree - 1) * pairs,
            "reduce_scatter tp": (4 * 3 + 2) * part,
        }


@UNIT
def test_the_loss_of_a_whole_vocabulary_is_the_models() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(2, 5, 11, generator=draw, dtype=torch.float64)).requires_grad_()
    targets = torch.tensor([[3, IGNORED, 0, 10, 7], [IGNORED] * 5])
    (expected,) = torch.autograd.grad(loss_sum(logits, targets), logits)
    loss = vocabulary_loss(logits, targets, range(11), Axis(("tp",), 1, 0))
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, loss_sum(logits, targets))
    torch.testing.assert_close(found, expected)
    assert vocabulary_loss(logits[1:], targets[1:], range(11), Axis(("tp",), 1, 0)).item() == 0.0


@UNIT
def test_shared_weights_are_back_even_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    names = list(dict(layer.named_parameters()))
    share_weights(layer, [(layer, "weight")], Axis(("tp",), 2, 0))
    for x in (torch.ones(1, 2), torch.ones(1, 3)):
        try:
            assert layer(x).shape == (1, 2)
        except RuntimeError:
            assert x.shape == (1, 3)
        assert isinstance(layer.weight, nn.Parameter)
        assert list(dict(layer.named_parameters())) == names


@UNIT
def test_a_copy_of_a_piece_stays_one_when_it_is_cut_again() -> None:
    assert Layout((4, 4), (0, 0), (2, 4), sharded=("tp",), copy=1).cut(1, 0, 2, ("dp_shard",)).copy == 1


def verify(mesh: dict[str, dict[str, Any]], **settings: Any) -> Verdict:
    return world.verifier(measure=True).verify(case("native", "tensor", mesh, **settings))


def tp(degree: int, *, sequence: bool = False) -> dict[str, dict[str, Any]]:
    return {"tp": {"degree": degree, "sequence": sequence}}


def dp(degree: int, strategy: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {"dp": {"degree": degree, "strategy": strategy, **options}}


WIDE = MODEL.model_copy(update={"heads": 8, "width": 32})
CASES: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    **{f"tp {n}, sequence": (tp(n, sequence=True), {}) for n in (3, 4)},
    "tp 8": (tp(8, sequence=True), {"model": WIDE}),
    "one key, tied": (tp(4, sequence=True), {"model": TIED, "data": Data(sequence=24, layout="padded")}),
    "heads that do not divide": (tp(2), {"model": ODD}),
    "columns that do not divide": (tp(3, sequence=True), {"data": Data(sequence=25)}),
    "shared keys, cut by rows": (tp(4) | dp(2, "fsdp"), {}),
    "replicas": (tp(2) | dp(4, "zero2", replicas=2), {}),
    "context, zigzag": (tp(2, sequence=True) | {"cp": {"degree": 3}}, {"data": Data(sequence=28)}),
}


@PARITY
@pytest.mark.parametrize("name", CASES)
def test_gradients_bytes_and_memory_are_the_unsharded_runs_and_the_formulas(name: str) -> None:
    mesh, settings = CASES[name]
    verdict = verify(mesh, **settings)
    assert verdict.status == "held", verdict.cause


@PARITY
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bfloat16_is_as_near_as_its_noise(strategy: str) -> None:
    mesh = tp(2, sequence=True) | dp(2, strategy)
    verdict = verify(mesh, dtype="bfloat16")
    assert verdict.status == "held", verdict.cause


@PARITY
def test_sequence_parallelism_holds_less_while_it_runs() -> None:
    model, train = MODEL.model_copy(update={"width": 48}), {"batch": 4, "microbatches": 1}
    plain, cut = (
        verify(tp(2, sequence=sequence), model=model, train=train, data=Data(sequence=768))  # more than 1 MiB
        for sequence in (False, True)
    )
    assert max(cut.peak) < 0.9 * min(plain.peak)


@PARITY
@pytest.mark.parametrize("sequence", [False, True])
def test_validation_agrees_with_the_unsharded_run(sequence: bool) -> None:
    settings = case("native", "tensor", tp(2, sequence=sequence)).config
    (expected,) = launch(1, world.losses, settings.reference(), timeout=world.TIMEOUT)
    for found in launch(2, world.losses, settings, timeout=world.TIMEOUT):
        assert found == pytest.approx(expected, rel=1e-12)


@UNIT
def test_the_catalogue_of_tensor_parallelism_is_planted() -> None:
    numbers = {fault.number for fault in FAULTS.values() if fault.strategy == "tensor"}
    assert numbers >= {10, 11, 12, 13, *range(15, 22), 33, 34, 35, 45, 46, 47}
