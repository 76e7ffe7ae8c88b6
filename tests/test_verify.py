"""The judgement: what differs, by how much, and why, from hand-made findings; and what a verdict must not let pass."""

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import world
from torch import Tensor

from sandbox.config import Config, Mesh
from sandbox.errors import ConfigError
from sandbox.layout import Layout
from sandbox.verdict import Difference
from sandbox.verify import Case, Verdict, Verdicts, fixture, verifier
from sandbox.verify import diagnose as diagnose_module
from sandbox.verify.capture import Piece, Pieces
from sandbox.verify.cases import alone
from sandbox.verify.compare import Whole, assemble, differences, spread
from sandbox.verify.diagnose import Findings, diagnose

unit, parity = pytest.mark.unit, pytest.mark.parity

NAMES = [
    "embed.weight",
    "blocks.0.norm1.weight",
    "blocks.0.attention.q.weight",
    "blocks.0.attention.q.bias",
    "norm.weight",
]
CONFIG = Config(mesh=Mesh.model_validate({"dp": {"degree": 4, "replicas": 2}}), train={"microbatches": 3})  # type: ignore[arg-type]


# Pieces and differences


def rows(full: Tensor, start: int, stop: int) -> Piece:
    layout = Layout.whole(tuple(full.shape)).cut(0, start, stop, ("dp",))
    return Piece(layout, layout.take(full).clone())


def ranks(*pieces: Piece) -> list[Pieces]:
    return [Pieces.of({"w": piece.layout}, [piece.local]) for piece in pieces]


def together(pieces: list[Pieces]) -> dict[str, Whole]:
    (step,) = assemble([[one] for one in pieces])
    return step


FULL = torch.arange(1.0, 13.0, dtype=torch.float64).view(4, 3)


@unit
def test_pieces_are_put_together_by_their_layouts() -> None:
    whole = together(ranks(rows(FULL, 2, 4), rows(FULL, 0, 2)))["w"]
    assert torch.equal(whole.value, FULL)
    assert whole.drift == 0


@unit
def test_what_no_rank_holds_is_infinitely_wrong() -> None:
    for pieces in (ranks(rows(FULL, 0, 3)), ranks(rows(FULL, 0, 2), rows(FULL, 3, 4))):
        (found,) = differences(together(pieces), {"w": FULL}, {})
        assert found.error == math.inf


@unit
def test_a_tensor_that_is_absent_or_too_many_is_infinitely_wrong() -> None:
    found = differences({"other": Whole(FULL, 0.0)}, {"w": FULL}, {})
    assert {(d.tensor, d.error) for d in found} == {("w", math.inf), ("other", math.inf)}


@unit
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_infinitely_wrong(value: float) -> None:
    bad = FULL.clone()
    bad[1, 1] = value
    (found,) = differences(together(ranks(rows(bad, 0, 4))), {"w": FULL}, {})
    assert found.error == math.inf


@unit
def test_ranks_that_disagree_drift_even_if_the_first_is_right() -> None:
    other = FULL.clone()
    other[0, 0] += 0.12
    whole = together(ranks(rows(FULL, 0, 4), rows(other, 0, 2)))
    (found,) = differences(whole, {"w": FULL}, {})
    assert (found.error, found.drift) == (0, pytest.approx(0.01))


@unit
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_a_number_on_one_of_two_ranks_is_infinitely_wrong(place: int) -> None:
    bad = FULL.clone()
    bad[1, 1] = math.nan
    both = [rows(FULL, 0, 4), rows(FULL, 0, 4)]
    both[place] = rows(bad, 0, 4)
    (found,) = differences(together(ranks(*both)), {"w": FULL}, {})
    assert found.drift == math.inf


@unit
def test_errors_are_relative_to_the_largest_element() -> None:
    wrong = FULL.clone()
    wrong[0, 0] += 1.2
    (found,) = differences(together(ranks(rows(wrong, 0, 4))), {"w": FULL}, {})
    assert found.error == pytest.approx(0.1)
    assert not found.floored


@unit
def test_a_zero_gradient_is_measured_against_its_noise() -> None:
    noise = {"w": Whole(FULL * 1e-18, 0.0)}
    (found,) = differences(noise, {"w": -FULL * 1e-18}, {"w": 1e-3})
    assert found.floored
    assert found.error < 1e-12
    (without,) = differences(noise, {"w": -FULL * 1e-18}, {})
    assert without.error == pytest.approx(2)


@unit
def test_zero_held_against_zero_is_no_difference() -> None:
    zero = torch.zeros(2)
    (found,) = differences({"w": Whole(zero, 0.0)}, {"w": zero}, {})
    assert (found.error, found.cos) == (0, 1)


@unit
@pytest.mark.parametrize("factor", [2.0, 0.25, -1.0])
def test_ratio_and_cosine_tell_a_scale_from_a_direction(factor: float) -> None:
    (found,) = differences({"w": Whole(FULL * factor, 0.0)}, {"w": FULL}, {})
    assert (found.ratio, found.cos) == (pytest.approx(factor), pytest.approx(math.copysign(1, factor)))
    (other,) = differences({"w": Whole(FULL.flip(0), 0.0)}, {"w": FULL}, {})
    assert other.cos < 0.99


@unit
def test_the_worst_comes_first() -> None:
    found = {"a": Whole(FULL, 0.0), "b": Whole(FULL * 2, 0.0), "c": Whole(FULL, 30.0)}
    assert [d.tensor for d in differences(found, dict.fromkeys("abc", FULL), {})] == ["c", "b", "a"]


@unit
def test_spread_is_the_largest_absolute_difference() -> None:
    assert spread({"w": FULL}, {"w": FULL + torch.eye(4, 3) * 0.5}) == {"w": 0.5}


# Diagnosis


def right(names: list[str] = NAMES) -> list[Difference]:
    return [Difference(tensor=name, error=1e-15, ratio=1, cos=1) for name in names]


def off(
    names: list[str], *, error: float = 1.0, ratio: float = 2.0, cos: float = 1.0, drift: float = 0.0
) -> list[Difference]:
    wrong = [Difference(tensor=name, error=error, ratio=ratio, cos=cos, drift=drift) for name in names]
    return [*wrong, *right([name for name in NAMES if name not in names])]


def findings(**changes: Any) -> Findings:
    good = Findings(
        config=CONFIG, tolerance=1e-12, losses=[0.0] * 3, norms=[1.0] * 3, rates=[1.0] * 3,
        gradients=[right()] * 3, parameters=[right()] * 4, rows="", weights="", amounts="",
    )  # fmt: skip
    return replace(good, **changes)


def first(wrong: list[Difference]) -> list[list[Difference]]:
    return [wrong, right(), right()]


@unit
def test_where_nothing_differs_there_is_no_cause() -> None:
    assert diagnose(findings()) == ""


@unit
@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        (
            {"gradients": first(off(NAMES))},
            "scale: every gradient is 2.0000 times the reference (mesh.dp.replicas = 2: ",
        ),
        (
            {"gradients": first(off(NAMES, ratio=4))},
            "scale: every gradient is 4.0000 times the reference (mesh.dp.degree = 4",
        ),
        (
            {"gradients": first(off(NAMES, ratio=1 / 3))},
            "scale: every gradient is 0.3333 times the reference (1 / (train.micro",
        ),
        ({"gradients": first(off(NAMES, ratio=7))}, "scale: every gradient is 7.0000 times the reference."),
        (
            {"gradients": first(off([NAMES[1], NAMES[4]], ratio=0.5))},
            "reduction: the gradients of all norms are 0.5000 times",
        ),
        ({"gradients": first(off([NAMES[3]], ratio=0.7))}, "reduction: the gradients of all biases are 0.7000 times"),
        (
            {"gradients": first(off([NAMES[0]], cos=0.9))},
            "reduction: only the embedding differ (1 of 5); worst ratio 2.0000",
        ),
        ({"gradients": first(off(NAMES[1:4], cos=0.9))}, "reduction: only block 0 differ (3 of 5)"),
        ({"gradients": first(off(NAMES, drift=0.5))}, "reduction: ranks that should hold the same gradient"),
        (
            {"gradients": first(off(NAMES, drift=0.5)), "losses": [0.1] * 3},
            "forward: the loss itself differs by 1.0e-01, and ranks that should compute the same",
        ),
        (
            {"gradients": first(off([NAMES[2]], ratio=0, cos=0))},
            "backward: the gradients of blocks.0.attention.q.weight (1 of 5) are zero",
        ),
        (
            {"gradients": first(off(NAMES, error=1e-3, ratio=1.0001))},
            "precision: 5 of 5 gradients are off by up to 1e-03",
        ),
        (
            {"gradients": first(off(NAMES, cos=0.9))},
            "weighting: the loss is right, but no gradient points where it should",
        ),
        ({"gradients": first(off(NAMES, cos=0.9)), "losses": [0.1] * 3}, "forward: the loss itself differs by 1.0e-01"),
        (
            {"gradients": first(off(NAMES, cos=0.9)), "losses": [0.1] * 3, "weights": "a mean of means"},
            "weighting: a mean of means: every gradient differs",
        ),
        (
            {"norms": [2**0.5, 1, 1]},
            "norm: all gradients are right, but their global norm is 1.4142 times the reference's (the root of",
        ),
        ({"norms": [1, 1, 1.1]}, "norm: from step 3 on it is 1.1000 times the reference's."),
        ({"norms": [1, math.nan, 1]}, "norm: from step 2 on it is nan times"),
        ({"rates": [2, 1, 1]}, "learning rate: it is 2.0000 times the reference's at the first step."),
        ({"rates": [1, 1, 0.5]}, "learning rate: it is 0.5000 times the reference's at step 3."),
        ({"parameters": [off(NAMES[:1]), *[right()] * 3]}, "initialisation: first values differ of embed.weight."),
        (
            {"parameters": [off(NAMES[:1], drift=1), *[right()] * 3]},
            "initialisation: ranks start from different values of embed",
        ),
        (
            {"parameters": [right(), off(NAMES[:1]), right(), right()]},
            "optimizer: gradients and their norm agree, but the embedding (1 of 5)",
        ),
        (
            {"parameters": [right(), off(NAMES[:1], drift=1), right(), right()]},
            "optimizer: gradients agree, but after the step ranks hold",
        ),
        ({"gradients": [right(), off(NAMES), right()]}, "state: all is right up to step 1, then the gradients of"),
        (
            {"parameters": [right(), right(), right(), off(NAMES)]},
            "state: all is right up to step 2, then the parameters of",
        ),
        ({"gradients": first(off(NAMES[:1], error=math.inf))}, "partition: no rank holds all of embed.weight"),
        ({"rows": "rows 1 were never seen."}, "data: rows 1 were never seen."),
        ({"amounts": "bytes: rank 0 sent 1"}, "bytes: rank 0 sent 1"),
    ],
)
def test_a_pattern_names_its_cause(changes: dict[str, Any], cause: str) -> None:
    assert diagnose(findings(**changes)).startswith(cause)


@unit
def test_where_the_step_is_not_judged_what_comes_before_it_is() -> None:
    """AdamW's: the first values, and the first step's gradients and norm."""
    short = {"losses": [0.0], "norms": [1.0], "rates": [1.0], "gradients": [right()], "parameters": [right()]}
    assert diagnose(findings(**short)) == ""
    assert diagnose(findings(**short | {"gradients": [off(NAMES, ratio=2.0)]})).startswith("scale")
    assert diagnose(findings(**short | {"norms": [2.0]})).startswith("norm")
    assert diagnose(findings(**short | {"amounts": "memory: rank 0 held 1"})).startswith("memory")


@unit
def test_where_several_layers_come_first_the_same_one_is_named_every_time() -> None:
    """Names of no known layer are all at depth 0. A set of them would be in another order in every process."""
    some = [f"part{number}.weight" for number in range(9)]
    every = [Difference(tensor=name, error=1.0, ratio=0.5, cos=0.5) for name in [*some, "head.weight"]]
    assert diagnose_module._cut_short(every[:-1], every) == "part0"


@unit
def test_a_run_that_computes_again_is_reminded_of_it() -> None:
    wrong = off(NAMES[1:2], ratio=0.5, cos=0.5)
    again = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"recompute": "full"})})
    assert "train.recompute" in diagnose(findings(config=again, gradients=first(wrong)))
    assert "train.recompute" not in diagnose(findings(gradients=first(wrong)))


@unit
def test_what_happens_first_is_named_first() -> None:
    everything = {
        "gradients": [off(NAMES)] * 3,
        "parameters": [off(NAMES)] * 4,
        "norms": [2.0] * 3,
        "rows": "rows differ.",
        "amounts": "bytes: too many",
    }
    kinds = []
    for key, repaired in (
        ("parameters", [right(), *[off(NAMES)] * 3]),
        ("rows", ""),
        ("gradients", [right(), *[off(NAMES)] * 2]),
        ("norms", [1.0] * 3),
        ("parameters", [right()] * 4),
        ("gradients", [right()] * 3),
        ("amounts", ""),
    ):
        kinds.append(diagnose(findings(**everything)).split(":")[0])
        everything[key] = repaired
    assert kinds == ["initialisation", "data", "scale", "norm", "optimizer", "state", "bytes"]
    assert diagnose(findings(**everything)) == ""


# Verdicts


@unit
def test_the_fixture_keeps_what_is_verified_and_roughens_the_rest() -> None:
    config = Config.model_validate(
        {
            "mesh": {"dp": {"degree": 2, "strategy": "zero1"}},
            "model": {"layers": 1, "dropout": 0.3},
            "train": {
                "batch": 9,
                "microbatches": 2,
                "steps": 100,
                "optimizer": "adamw",
                "seed": 5,
                "dtype": "bfloat16",
            },
        }
    )
    made = fixture(config)
    assert made.mesh == config.mesh
    assert (made.train.batch, made.train.microbatches, made.train.seed) == (9, 2, 5)
    assert (made.train.steps, made.train.optimizer, made.train.dtype) == (3, "sgd_momentum", "float64")
    assert (made.data.mask, made.model.init, made.model.dropout) == ("ragged", "rough", 0.3)
    assert fixture(config, None).train.dtype == "bfloat16"


@unit
def test_verdicts_survive_being_written_and_read() -> None:
    verdict = Verdict(
        name="a", engine="native", strategy="ddp", mesh="dp 2", dtype="float64", world=2, status="mismatch",
        gradients=[Difference(tensor="w", error=math.inf, ratio=0, cos=0)],
    )  # fmt: skip
    again = Verdicts.model_validate_json(Verdicts(cases=[verdict]).model_dump_json())
    assert again.cases == [verdict]
    (written,) = json.loads(again.model_dump_json())["cases"]
    assert Difference.model_validate(written.pop("worst")) == verdict.gradients[0]
    assert Verdict.model_validate(written) == verdict, "as it was written before there was a worst"
    assert not again.cases[0].held


@parity
def test_a_case_that_is_tampered_with_but_not_changed_holds() -> None:
    verdict = world.verifier().verify(replace(alone("native", "ddp", 2, ""), prepare=world.nothing))
    assert (verdict.status, verdict.cause) == ("held", "")
    assert verdict.losses == pytest.approx(verdict.reference_losses, rel=1e-12)
    assert verdict.seconds > 0


@parity
@pytest.mark.parametrize("what", ["clip", "forward_backward"])
def test_a_norm_or_loss_that_is_not_a_number_in_one_step_is_a_mismatch(what: str) -> None:
    sick = Case(
        alone("native", "ddp", 2, "", train={"clip": None}).config, prepare=partial(world.not_a_number, what=what)
    )
    verdict = world.verifier().verify(sick)
    assert verdict.status == "mismatch"
    assert verdict.cause


@parity
def test_a_rank_that_fails_is_a_failed_case_with_its_error() -> None:
    verdict = world.verifier().verify(replace(alone("native", "ddp", 2, ""), prepare=world.raise_on_one_rank))
    assert verdict.status == "failed"
    assert not verdict.held
    assert verdict.cause.startswith("rank 1 failed: ValueError: planted")


@parity
def test_a_case_that_cannot_be_planned_is_failed_or_unsupported_and_never_raises() -> None:
    config = alone("native", "ddp", 2, "").config
    axis = {"degree": 2, "strategy": "zero2"}
    mesh = Mesh.model_validate({"dp": axis})
    verdict = world.verifier().verify(Case(config.model_copy(update={"engine": "torch", "mesh": mesh})))
    assert (verdict.status, verdict.held) == ("unsupported", True)
    assert "Nearest" in verdict.cause
    wrong = Mesh.model_validate({"dp": {**axis, "strategy": "zero9"}})
    verdict = world.verifier().verify(Case(config.model_copy(update={"mesh": wrong})))
    assert verdict.status == "failed"
    with pytest.raises(ConfigError, match="zero9"):
        from sandbox.plan import plan

        plan(config.model_copy(update={"mesh": wrong}))


@parity
@pytest.mark.parametrize("strategy", world.NATIVE)
def test_a_case_has_the_timeline_of_one_step_if_asked_for(strategy: str) -> None:
    assert not any(world.verifier().verify(alone("native", strategy, 2, "")).timeline)
    verdict = world.verifier(measure=True).verify(alone("native", strategy, 2, ""))
    assert verdict.status == "held", verdict.cause
    assert len(verdict.timeline) == 2
    for spans in verdict.timeline:
        assert {span.lane for span in spans} == {"compute", "collective"}
        assert all(0 <= span.start <= span.end for span in spans)
        assert any(span.bytes for span in spans)


@parity
def test_one_reference_serves_all_layouts_of_a_training() -> None:
    references = world.verifier().references
    base = alone("native", "ddp", 2, "").config
    other = alone("torch", "fsdp", 4, "another name").config
    assert references.of(base) is references.of(other)
    seed = base.model_copy(update={"train": base.train.model_copy(update={"seed": 7})})
    assert references.of(seed) is not references.of(base)


@parity
def test_a_gradient_that_is_zero_in_exact_arithmetic_does_not_decide() -> None:
    """Without rotary positions a key's bias is invisible to the softmax: its gradient is noise."""
    model = {"layers": 1, "rotary": False, "qk_norm": False, "bias": True}
    config = fixture(world.config("zero2", 3, model=model))
    verdict = world.verifier().verify(Case(config))
    assert verdict.status == "held", verdict.cause
    floored = [d.tensor for d in verdict.gradients if d.floored]
    assert floored == ["blocks.0.attention.k.bias"]


@parity
def test_verdicts_keep_the_order_of_the_cases_and_share_references(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds: list[int] = []

    def launch(world: int, *args: Any, **options: Any) -> list[Any]:
        worlds.append(world)
        return inner(world, *args, **options)

    inner = verifier.launch
    monkeypatch.setattr(verifier, "launch", launch)
    cases = [alone("native", strategy, world, "") for strategy, world in (("zero1", 3), ("ddp", 2), ("tensor", 2))]
    verdicts = list(verifier.Verifier().verify_all(cases))
    assert [verdict.name for verdict in verdicts] == [case.config.name for case in cases]
    assert {verdict.status for verdict in verdicts} == {"held"}
    assert sorted(worlds) == [1, 2, 2, 3]


@parity
def test_a_step_without_a_target_holds() -> None:
    """Two rows of one column: the first is hidden whole, and in some step of this seed the other one too."""
    config = world.config("zero3", data={"sequence": 1}, train={"batch": 2, "microbatches": 1, "seed": 0})
    verdict = world.verifier().verify(Case(config))
    assert verdict.status == "held", verdict.cause
    assert 0.0 in verdict.reference_losses
