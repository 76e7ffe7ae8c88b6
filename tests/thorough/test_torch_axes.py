"""Engine torch on the other axes: what it refuses, worlds against the unsharded run, and its ring beside ours."""

import functools
import re
from typing import Any

import pytest
import torch
import torch_axes_work as work
import world

from sandbox.config import Config, Data, Model
from sandbox.engines.torch.pipeline import NAMES
from sandbox.errors import ConfigError, WorkerError
from sandbox.model import build
from sandbox.plan import plan
from sandbox.runtime import launch, warm
from sandbox.verify import Verdict, Verifier
from sandbox.verify.cases import EXPERTS, MANY, MODEL, SWITCH, TIED, case

UNIT, PARITY = pytest.mark.unit, pytest.mark.parity

Axes = dict[str, dict[str, Any]]
ONE_EACH = TIED.model_copy(update={"kv_heads": 4})  # heads of keys that two ranks of torch can share
DEEP = MODEL.model_copy(update={"layers": 6})
UNEVEN = MODEL.model_copy(update={"hidden": 29, "mlp": "swiglu", "vocab": 259})


def mesh(pp: str = "", dp: str = "", *, tp: bool = False, sequence: bool = False, degree: int = 2) -> Axes:
    """Two ranks, or `degree` stages, of each axis that is asked for, by its schedule or strategy."""
    axes: Axes = {}
    if pp:
        axes["pp"] = {"degree": degree, "schedule": pp}
    if dp:
        axes["dp"] = {"degree": 2, "strategy": dp}
    if tp or sequence:
        axes["tp"] = {"degree": 2, "sequence": sequence}
    return axes


def settings(axes: Axes, **changes: Any) -> Config:
    return case("torch", "case", axes, **changes).config


REFUSED: list[tuple[Axes, dict[str, Any], str]] = [
    (mesh("1f1b"), {"model": EXPERTS}, "model.experts: torch's schedules take the loss of the last stage alone"),
    (
        {"tp": {"degree": 3}},
        {},
        "mesh.tp.degree 3 does not divide model.heads 4, .* Degrees that do: 1, 2. Engine native",
    ),
    ({"tp": {"degree": 4}}, {}, "mesh.tp.degree 4 does not divide model.kv_heads 2, .* Degrees that do: 1, 2."),
    ({"tp": {"degree": 2, "sequence": True}}, {"data": Data(sequence=23)}, "does not divide data.sequence 23, "),
    (
        {"tp": {"degree": 4}},
        {"model": MANY.model_copy(update={"hidden": 5})},
        r"leaves a rank without .* model.hidden 5\. Degrees that do: 1 to 3",
    ),
    ({"tp": {"degree": 2}, "dp": {"degree": 2, "strategy": "zero1"}}, {}, "mesh.tp: .* Set mesh.dp.strategy: fsdp"),
    (mesh("1f1b", degree=4), {}, "train.microbatches 3: torch's 1F1B needs .* 4 stages. .*: gpipe, or .*: 4."),
    (mesh("dualpipe_v"), {}, "train.microbatches 3: torch's DualPipeV needs one for each of 4 stages."),
    (mesh("interleaved"), {"train": {"microbatches": 5}}, "in 2 rounds of equal size .* Set train.microbatches: 4."),
    (mesh("zbv", degree=4), {}, "needs 8 parts, .* Set model.layers: 6."),
    (mesh("zbv", "fsdp"), {"model": TIED}, "model.tied: .* two roots cannot share a weight. Set .*: 1f1b."),
    ({"pp": {"degree": 2, "schedule": "zbv", "stages": 3}}, {}, "mesh.pp.stages 3: .* Set mesh.pp.stages: 2."),
    (mesh("zbv", tp=True), {"train": {"recompute": "full"}}, "train.recompute: torch's ZBVZeroBubble .* again for"),
]


@UNIT
@pytest.mark.parametrize(("axes", "changes", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_torch_cannot_do_is_refused_before_it_starts(axes: Axes, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(settings(axes, **changes))
    assert re.search(message, str(caught.value))


@UNIT
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_each_schedule_of_torch_has_a_name() -> None:
    from torch.distributed.pipelining import schedules

    assert {kind.__name__ for kind in map(schedules.get_schedule_class, NAMES.values())} == {
        name for name in dir(schedules) if re.fullmatch(r"Schedule[A-Z0-9]\w+", name)
    }


@UNIT
def test_rows_of_padding_add_nothing_to_the_loss() -> None:
    given = work.batch()
    model = build(Model(layers=1, width=8, heads=2), "float64").to_empty(device="cpu")
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param)
    more = given.filled(5)
    assert len(more.rows) == len(more.tokens) == 5
    assert more.valid == given.valid
    assert given.filled(len(given.rows)) is given
    assert torch.equal(model(more)[: len(given.rows)], model(given))


@functools.cache
def verifier() -> Verifier:
    warm("sandbox.verify")
    return Verifier(world.patient)


def verify(axes: Axes, **changes: Any) -> Verdict:
    return verifier().verify(case("torch", "case", axes, **changes))


FOUR = {"train": {"microbatches": 4}}
CASES: dict[str, tuple[Axes, dict[str, Any]]] = {
    "what does not divide": (mesh(tp=True), {"model": UNEVEN}),
    "what does not divide, cut by rows": (mesh(dp="fsdp", sequence=True), {"model": UNEVEN}),
    **{f"tp, {dp}, tied": (mesh(dp=dp, sequence=True), {"model": ONE_EACH}) for dp in ("ddp", "fsdp")},
    **{
        f"tp, {dp}, sync {sync}": ({"tp": {"degree": 2}, "dp": {"degree": 2, "strategy": dp, "sync": sync}}, {})
        for dp, sync in (("ddp", "each"), ("fsdp", "last"))
    },
    "tp, replicas": ({"tp": {"degree": 2}, "dp": {"degree": 4, "replicas": 2, "strategy": "fsdp"}}, {}),
    **{
        f"recompute {how}, dropout {dropout}": (
            mesh(sequence=True),
            {"train": {"recompute": how}, "model": MODEL.model_copy(update={"dropout": dropout})},
        )
        for how, dropout in (("full", 0.0), ("full", 0.1), ("selective", 0.1))
    },
    "tp, replicas of ddp": ({"tp": {"degree": 2}, "dp": {"degree": 4, "replicas": 2, "strategy": "ddp"}}, {}),
    "pp, replicas": (mesh("1f1b") | {"dp": {"degree": 4, "replicas": 2, "strategy": "fsdp"}}, {}),
    **{f"pp, {dp}, tied": (mesh("1f1b", dp), {"model": TIED}) for dp in ("ddp", "fsdp")},
    **{f"{name}, fsdp": (mesh(name, "fsdp"), FOUR) for name in NAMES if name != "1f1b"},
    **{f"{name}, ddp": (mesh(name, "ddp"), FOUR) for name in ("interleaved_zb", "zbv", "dualpipe_v")},
    **{f"{name}, tp": (mesh(name, sequence=True), FOUR) for name in NAMES},
    **{
        f"recompute {how}, {name}": (mesh(name), {"train": {"microbatches": 4, "recompute": how}})
        for how, name in (("full", "interleaved_zb"), ("selective", "zbv"), ("full", "dualpipe_v"))
    },
    "three stages": (mesh("interleaved_zb", degree=3), {"model": DEEP}),
    "stages in a V, tied": (mesh("zbv", degree=4), {"model": ONE_EACH.model_copy(update={"layers": 6})}),
    "three stages a rank": (
        {"pp": {"degree": 2, "schedule": "interleaved", "stages": 3}, "dp": {"degree": 2, "strategy": "fsdp"}},
        {"model": DEEP},
    ),
    **{
        f"experts, tp, {dp}, sequence {sequence}": (mesh(dp=dp, tp=True, sequence=sequence), {"model": EXPERTS})
        for dp, sequence in (("ddp", False), ("fsdp", True))
    },
    "experts, recompute full": (mesh(sequence=True), {"model": EXPERTS, "train": {"recompute": "full"}}),
    "experts, one choice": (mesh(tp=True), {"model": SWITCH.model_copy(update={"kv_heads": 2})}),
    "ddp, tp, pp": (mesh("1f1b", "ddp", sequence=True), {}),
    "fsdp, tp, pp, tied": (mesh("gpipe", "fsdp", tp=True), {"model": ONE_EACH}),
    "fsdp, tp, pp, zero bubble": (mesh("interleaved_zb", "fsdp", sequence=True), {}),
}


@PARITY
@pytest.mark.parametrize("name", CASES)
def test_gradients_bytes_and_memory_are_the_unsharded_runs_and_the_formulas(name: str) -> None:
    axes, changes = CASES[name]
    verdict = verify(axes, **changes)
    assert verdict.status == "held", verdict.cause
    assert verdict.tolerance == 1e-12


@PARITY
@pytest.mark.parametrize(
    ("axes", "microbatches"), [(mesh(dp="fsdp", sequence=True), 3), (mesh("gpipe", "fsdp", tp=True), 1)]
)
def test_fsdp_gathers_and_reduces_in_bfloat16_what_tp_sums(axes: Axes, microbatches: int) -> None:
    verdict = verify(axes, train={"microbatches": microbatches}, dtype="bfloat16")
    assert verdict.status == "held", verdict.cause


@PARITY
@pytest.mark.parametrize("axes", [*map(mesh, NAMES), mesh("1f1b", "fsdp", sequence=True)], ids=str)
def test_validation_agrees_with_the_unsharded_run(axes: Axes) -> None:
    config = settings(axes, train={"microbatches": 4})
    verifier()
    (expected,) = launch(1, world.losses, config.reference(), timeout=world.TIMEOUT)
    for found in launch(config.mesh.world, world.losses, config, timeout=world.TIMEOUT):
        assert found == pytest.approx(expected, rel=1e-12)


@PARITY
def test_torch_still_cannot_evaluate_over_two_stages_of_one_rank() -> None:
    verifier()
    with pytest.raises(WorkerError, match="can't steal_bwd_input if this stage doesn't have backward"):
        launch(2, work.evaluated_by_torch_alone, settings(mesh("zbv")), timeout=world.TIMEOUT)


@PARITY
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_our_ring_and_torchs_private_one_agree_with_one_process(order: str) -> None:
    verifier()
    for expected, ours, theirs in launch(3, work.rings, order, timeout=world.TIMEOUT):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-13)
