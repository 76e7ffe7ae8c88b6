"""What backward computes again is the same to the bit, and saves and sends what is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recompute_work as work
import torch
import world
from torch import nn

from sandbox.batch import Batch
from sandbox.config import Config, Data, Mesh, Model, Train
from sandbox.model import Attention, Block, build, initial, loss_sum
from sandbox.plan import predict
from sandbox.program import replace_parameters
from sandbox.recompute import recompute
from sandbox.runtime import launch
from sandbox.schedules import make, peaks
from sandbox.stages import WeightsLater

UNIT, PARITY = pytest.mark.unit, pytest.mark.parity
HOW = pytest.mark.parametrize("how", ["selective", "full"])
MODEL = Model(layers=3, width=16, heads=4, kv_heads=2, norm="layer", bias=True, dropout=0.1, init="rough")


def real(how: Any) -> nn.Module:
    model = build(MODEL, "float64")
    values = {n: nn.Parameter(initial(n, p.shape, MODEL, 0, torch.float64)) for n, p in model.named_parameters()}
    replace_parameters(model, values)
    recompute(model, how)
    return model.train()


def batch() -> Batch:
    tokens = torch.randint(257, (3, 8), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(7).expand(3, -1)
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, 0 * positions, torch.arange(3), torch.arange(7), key=3)


def config(how: str, mesh: dict[str, Any] | None = None, *, layers: int = 3, sequence: int = 48) -> Config:
    return Config(
        mesh=Mesh.model_validate(mesh or {}),
        model=MODEL.model_copy(update={"layers": layers}),
        data=Data(sequence=sequence, mask="ragged"),
        train=Train.model_validate({"batch": 8, "microbatches": 2, "dtype": "float64", "recompute": how}),
    )


@UNIT
@pytest.mark.parametrize(
    ("how", "blocks", "attentions"),
    [("none", [3, 3], [3, 3]), ("selective", [3, 3], [3, 6]), ("full", [3, 6], [3, 6])],
)
def test_blocks_or_their_attention_run_once_more_in_backward(
    how: Any, blocks: list[int], attentions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {Block: 0, Attention: 0}

    def counted(kind: type[Block | Attention]) -> Callable[..., Any]:
        inner = kind.forward

        def count(*args: Any) -> Any:
            calls[kind] += 1
            return inner(*args)

        return count

    for kind in calls:
        monkeypatch.setattr(kind, "forward", counted(kind))
    model = real(how)
    with torch.no_grad():
        model(batch())
    seen = [dict(calls)]
    loss = loss_sum(model(batch()), batch().targets)
    seen.append(dict(calls))
    loss.backward()
    seen.append(dict(calls))
    assert seen[0] == {Block: 3, Attention: 3}, "without gradients nothing is kept, so nothing is computed again"
    assert [at[Block] - 3 for at in seen[1:]] == blocks
    assert [at[Attention] - 3 for at in seen[1:]] == attentions


@UNIT
@HOW
@pytest.mark.parametrize("later", [False, True], ids=["", "weights later"])
def test_gradients_are_the_same_to_the_bit(how: str, later: bool) -> None:
    grads = []
    for what in ("none", how):
        model, given, late = real(what), batch(), WeightsLater()
        if later:
            with late:
                out = model(given)
        else:
            out = model(given)
        loss_sum(out, given.targets).backward()
        waiting = {name for name, p in model.named_parameters() if p.grad is None}
        linears = {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert waiting == (linears if later else set())
        late.run()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grad) for name, grad in grads[1].items())


@UNIT
def test_the_reference_computes_nothing_again() -> None:
    assert config("full").reference().train.recompute == "none"
    assert config("full").reference() == config("none").reference()


@UNIT
def test_the_gather_for_backward_serves_what_is_computed_again() -> None:
    for strategy in ("zero3", "fsdp"):
        mesh = {"dp": {"degree": 2, "strategy": strategy}}
        assert predict(config("full", mesh)) == predict(config("none", mesh))


@UNIT
def test_collectives_of_inner_axes_run_again_and_are_predicted() -> None:
    def more(how: str, **mesh: Any) -> dict[str, float]:
        one, other = (predict(config(what, mesh))[0].traffic for what in (how, "none"))
        return {key: one[key] - other[key] for key in one if one[key] != other[key]}

    x = 8 * 48 * 16 * 8  # bytes of a hidden state of all rows
    assert more("full", tp={"degree": 2}) == {"all_reduce tp": 3 * 2 * x}
    assert more("full", tp={"degree": 2, "sequence": True}) == {
        "all_gather tp": 3 * 2 * x / 2,
        "reduce_scatter tp": 3 * 2 * x / 2,
    }
    assert more("selective", tp={"degree": 2}) == {}
    assert more("selective", tp={"degree": 2, "sequence": True}) == {"all_gather tp": 3 * x / 2}
    assert more("full", cp={"degree": 2}) == {"send cp": 3 * x / 2}, "keys and values of 2 of 4 heads: X, of half"
    assert more("selective", cp={"degree": 2}) == {"send cp": 3 * x / 2}


# Memory


def activations(how: str, layers: int) -> int:
    return launch(1, work.kept, config(how, layers=layers), timeout=world.TIMEOUT)[0]


@PARITY
def test_of_a_block_its_input_alone_is_kept() -> None:
    block = {how: activations(how, 4) - activations(how, 3) for how in ("none", "selective", "full")}
    assert block["full"] == 8 * 48 * 16 * 8, "B S D"
    assert block["none"] > block["selective"] + 4 * block["full"], "queries, keys, values, the result, and more"
    assert block["none"] > 15 * block["full"]


@PARITY
@pytest.mark.parametrize(
    "mesh",
    [
        {"dp": {"degree": 2, "strategy": "ddp"}},
        {"dp": {"degree": 2, "strategy": "zero3"}},
        {"tp": {"degree": 2, "sequence": True}},
        {"cp": {"degree": 2, "kind": "gather"}},
        {"pp": {"degree": 2, "schedule": "1f1b"}},
        {"pp": {"degree": 2, "schedule": "zb_h1"}},
    ],
    ids=["ddp", "zero3", "tp", "cp", "1f1b", "zb_h1"],
)
def test_the_peak_falls(mesh: dict[str, Any]) -> None:
    none, selective, full = (
        max(launch(2, work.peak, config(how, mesh, layers=6), timeout=world.TIMEOUT))
        for how in ("none", "selective", "full")
    )
    late = mesh.get("pp", {}).get("schedule") == "zb_h1"  # inputs of linears wait for W
    assert selective < (0.95 if late else 0.9) * none
    assert full < (0.9 if late else 0.5) * none


# Worlds


@PARITY
@HOW
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_training_is_the_same_to_the_bit(strategy: str, how: str) -> None:
    kept, again = (
        world.ranks(world.config(strategy, model={"dropout": 0.2}, train={"recompute": what})) for what in ("none", how)
    )
    assert all(world.same_bits(one, other) for one, other in zip(kept, again, strict=True))


@PARITY
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_two_units_at_most_are_whole_while_one_is_computed_again(strategy: str) -> None:
    settings = world.config(strategy, train={"microbatches": 1, "recompute": "full"})
    seen = launch(2, world.lifetimes, settings, None, timeout=world.TIMEOUT)[0]
    assert len(seen["backward"]) > 20
    assert max(map(len, seen["backward"])) == 2
    assert seen["between"] == ["blocks.2", "head"]
    assert seen["after backward"] == []


def staged(schedule: str, microbatches: int, text: Path) -> Config:
    """Microbatches of one row and one document, for a mask takes room; next to them the parameters are small."""
    settings = config("none", {"pp": {"degree": 2, "schedule": schedule}}, layers=6, sequence=192)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"files": (text,)})})
    rows = {"batch": microbatches, "microbatches": microbatches}
    return settings.model_copy(update={"train": settings.train.model_copy(update=rows)})


@PARITY
def test_bytes_of_activations_are_those_of_the_microbatches_that_are_live_by_the_schedule(tmp_path: Path) -> None:
    """Of 8 microbatches on 2 ranks. By its table gpipe keeps all, 1f1b 2 and 1, zbv 2 of another half of the model.

    With as many as are live at most, gpipe keeps as much. Beyond that each microbatch has its rows, and what is on its
    way between stages: 10 %.
    """
    live = {name: peaks(make(name, 2, 8, 2 if name == "zbv" else 1)) for name in ("gpipe", "1f1b", "zbv")}
    assert live == {"gpipe": [8, 8], "1f1b": [2, 1], "zbv": [2, 2]}
    (text := tmp_path / "text").write_text("a long document. " * 20_000)
    runs = [*(("gpipe", number) for number in (1, 2, 4, 8)), ("1f1b", 8), ("zbv", 8)]
    found = launch(2, work.peaks, [staged(*run, text) for run in runs], timeout=world.TIMEOUT)
    first, second = (dict(zip(runs, measured, strict=True)) for measured in found)
    for rank, at in enumerate((first, second)):
        assert at["gpipe", 8] == pytest.approx(3 * at["gpipe", 4] - 2 * at["gpipe", 2], rel=0.01), "a straight line"
        assert at["gpipe", 8] > 4.5 * at["gpipe", 1]
        assert at["1f1b", 8] == pytest.approx(at["gpipe", live["1f1b"][rank]], rel=0.1)
    both = {run: first[run] + second[run] for run in runs}
    assert both["zbv", 8] == pytest.approx(both["gpipe", live["zbv"][0]], rel=0.1)


@PARITY
@pytest.mark.parametrize(("schedule", "most"), [("gpipe", 8), ("1f1b", 2), ("zb_h1", 2)])
def test_a_pipeline_lets_messages_go_when_an_answer_shows_that_they_came(schedule: str, most: int) -> None:
    settings = config("none", {"pp": {"degree": 2, "schedule": schedule}}, sequence=8)
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"microbatches": 8})})
    assert launch(2, work.waiting, settings, timeout=world.TIMEOUT) == [(most, 8), (most, 8)]
