"""A plan that cannot be is refused before anything starts, by a message that names the field and what would work.

Each row: the settings, what is said of them, and the settings that it names, each of which must be accepted.
"""

from typing import Any

import pytest

from sandbox.config import Config, check
from sandbox.errors import SandboxError
from sandbox.orders import LOOPED, VS
from sandbox.plan import plan
from sandbox.schedules import SCHEDULES

pytestmark = pytest.mark.unit

TABLE: dict[str, tuple[str, str, list[str]]] = {
    # the model itself
    "heads": (
        "model.width=12 model.heads=5",
        "model.heads 5 does not divide model.width 12. Those that do: 1, 2, 3, 4, 6, 12.",
        ["model.heads=1", "model.heads=6"],
    ),
    "key/value heads": (
        "model.heads=4 model.kv_heads=3",
        "model.kv_heads 3 does not divide model.heads 4. Those that do: 1, 2, 4.",
        ["model.kv_heads=1", "model.kv_heads=2", "model.kv_heads=4"],
    ),
    "odd heads": (
        "model.width=12 model.heads=4",
        "model.rotary needs an even head width, but model.width / model.heads = 3. "
        "Set model.heads to a divisor of 6, or model.rotary: false.",
        ["model.heads=2", "model.heads=3", "model.rotary=False"],
    ),
    "odd width": (
        "model.width=9 model.heads=3",
        "model.rotary needs an even head width, but model.width / model.heads = 3. Set model.rotary: false.",
        ["model.rotary=False"],
    ),
    # rows
    "batch": (
        "mesh.dp.degree=4 train.batch=11 train.microbatches=3",
        "train.batch 11 leaves a rank without a row: mesh.dp.degree 4 x train.microbatches 3 need at least 12. "
        "Set train.batch: 12.",
        ["train.batch=12", "train.microbatches=2"],
    ),
    "batch of a pipeline": (
        "mesh.pp.degree=2 train.batch=3 train.microbatches=4",
        "train.batch 3 leaves a rank without a row: mesh.dp.degree 1 x train.microbatches 4 need at least 4. "
        "Set train.batch: 4.",
        ["train.batch=4"],
    ),
    "replicas": (
        "mesh.dp.degree=4 mesh.dp.replicas=3 mesh.dp.strategy=fsdp",
        "mesh.dp.replicas 3 does not divide mesh.dp.degree 4. Those that do: 1, 2, 4.",
        ["mesh.dp.replicas=1", "mesh.dp.replicas=2", "mesh.dp.replicas=4"],
    ),
    # columns
    "sequence": (
        "mesh.cp.degree=8 data.sequence=6",
        "data.sequence 6 leaves a rank without a column: mesh.cp.degree is 8. "
        "Set data.sequence: 8, or mesh.cp.degree: 6.",
        ["data.sequence=8", "mesh.cp.degree=6"],
    ),
    "sequence, and tp cuts it too": (
        "mesh.cp.degree=4 mesh.tp.degree=2 mesh.tp.sequence=True data.sequence=7",
        "mesh.tp.degree 2 is more than data.sequence / mesh.cp.degree 1. Degrees that do: 1 to 1.",
        ["mesh.tp.degree=1", "data.sequence=8"],
    ),
    "sequence shorter than cp, and tp cuts it too": (
        "mesh.cp.degree=4 mesh.tp.degree=2 mesh.tp.sequence=True data.sequence=3",
        "mesh.tp.degree 2 is more than data.sequence / mesh.cp.degree 1. Degrees that do: 1 to 1.",
        ["data.sequence=8"],
    ),
    "heads for ulysses": (
        "mesh.cp.degree=3 mesh.cp.kind=ulysses",
        "mesh.cp.degree 3 does not divide model.heads 4, as kind ulysses needs. "
        "Degrees that do: 1, 2, 4. With kind ring or gather any degree will do.",
        ["mesh.cp.degree=1", "mesh.cp.degree=2", "mesh.cp.degree=4", "mesh.cp.kind=ring", "mesh.cp.kind=gather"],
    ),
    "heads for ulysses that tp deals out unevenly": (
        "mesh.cp.degree=2 mesh.cp.kind=ulysses mesh.tp.degree=3 model.heads=8",
        "mesh.cp.degree 2 does not divide the heads of each rank of tp, as mesh.cp.kind ulysses needs: of "
        "model.heads 8 ranks have 3, 3, 2. Set mesh.cp.kind: ring, or mesh.tp.degree: 1 or 2 or 4.",
        ["mesh.cp.kind=ring", "mesh.tp.degree=1", "mesh.tp.degree=2", "mesh.tp.degree=4"],
    ),
    # features
    "heads for tp": (
        "mesh.tp.degree=5",
        "mesh.tp.degree 5 is more than model.heads 4. Degrees that do: 1 to 4.",
        ["mesh.tp.degree=1", "mesh.tp.degree=3", "mesh.tp.degree=4"],
    ),
    "features for tp": (
        "mesh.tp.degree=4 model.hidden=3",
        "mesh.tp.degree 4 is more than model.hidden 3. Degrees that do: 1 to 3.",
        ["mesh.tp.degree=3"],
    ),
    # stages
    "stages": (
        "mesh.pp.degree=8 model.layers=3",
        "mesh.pp.degree 8 with 1 stage on each rank needs 8 parts, but embedding, 3 layers and head are 5. "
        "Set model.layers: 6, or mesh.pp.degree: 5.",
        ["model.layers=6", "mesh.pp.degree=5"],
    ),
    "stages of a V": (
        "mesh.pp.degree=4 mesh.pp.schedule=zbv model.layers=3",
        "mesh.pp.degree 4 with 2 stages on each rank needs 8 parts, but embedding, 3 layers and head are 5. "
        "Set model.layers: 6, or mesh.pp.degree: 2.",
        ["model.layers=6", "mesh.pp.degree=2"],
    ),
    "many stages a rank": (
        "mesh.pp.degree=2 mesh.pp.schedule=interleaved mesh.pp.stages=4 model.layers=3",
        "mesh.pp.degree 2 with 4 stages on each rank needs 8 parts, but embedding, 3 layers and head are 5. "
        "Set model.layers: 6.",
        ["model.layers=6"],
    ),
    "one stage a rank": (
        "mesh.pp.degree=2 mesh.pp.schedule=zb_h1 mesh.pp.stages=2",
        "mesh.pp.stages 2: schedule zb_h1 has 1 on each rank. "
        "Set mesh.pp.stages: 1, or mesh.pp.schedule: interleaved or breadth_first.",
        ["mesh.pp.stages=1", "mesh.pp.schedule=interleaved", "mesh.pp.schedule=breadth_first"],
    ),
    "microbatches for torch's 1f1b": (
        "engine=torch mesh.pp.degree=4 train.microbatches=2",
        "train.microbatches 2: torch's 1F1B needs one for each of 4 stages. "
        "Set train.microbatches: 4, or mesh.pp.schedule: gpipe.",
        ["train.microbatches=4", "mesh.pp.schedule=gpipe", "engine=native"],
    ),
    "microbatches for torch's interleaved": (
        "engine=torch mesh.pp.degree=2 mesh.pp.schedule=interleaved train.microbatches=5",
        "train.microbatches 5: torch's Interleaved1F1B runs them in 2 rounds of equal size over 2 ranks. "
        "Set train.microbatches: 4.",
        ["train.microbatches=4", "engine=native"],
    ),
    # names
    "schedule": (
        "mesh.pp.degree=2 mesh.pp.schedule=2f2b",
        "mesh.pp.schedule: '2f2b' is not one of 'gpipe', '1f1b', 'interleaved', 'breadth_first', 'zb_h1', 'zbv' "
        "or 'dualpipe_v'.",
        [f"mesh.pp.schedule={schedule}" for schedule in SCHEDULES],
    ),
    "order": (
        "mesh.cp.degree=2 mesh.cp.order=zickzack",
        "mesh.cp.order: 'zickzack' is not one of 'zigzag' or 'contiguous'.",
        ["mesh.cp.order=zigzag"],
    ),
    "option": (
        "mesh.tp.degree=2 mesh.tp.sequences=True",
        "mesh.tp.sequences is not a field. Did you mean mesh.tp.sequence?",
        [],
    ),
    "strategy": (
        "mesh.dp.degree=2 mesh.dp.strategy=zero4",
        "mesh.dp.strategy: 'zero4' is not a strategy of engine native. Did you mean zero3?",
        ["mesh.dp.strategy=zero3"],
    ),
    # strategies that exclude each other
    "strategy of another axis": (
        "mesh.tp.degree=2 mesh.tp.strategy=zero1",
        "mesh.tp.strategy: zero1 belongs to mesh.dp.",
        ["mesh.tp.strategy=tensor"],
    ),
    "two strategies for the data axis": (
        "mesh.dp.degree=2 mesh.pp.degree=2 mesh.pp.strategy=fsdp",
        "mesh.pp.strategy: fsdp belongs to mesh.dp.",
        ["mesh.pp.strategy=pipeline"],
    ),
    "as many replicas as ranks": (
        "engine=torch mesh.dp.degree=4 mesh.dp.strategy=fsdp mesh.dp.replicas=4",
        "mesh.dp.replicas 4: with as many replicas as ranks, fsdp has nothing to cut. "
        "Set mesh.dp.replicas: 1, or mesh.dp.strategy: ddp.",
        ["mesh.dp.replicas=1", "mesh.dp.strategy=ddp"],
    ),
    "strategy that an engine lacks": (
        "engine=torch mesh.dp.degree=2 mesh.dp.strategy=zero3",
        "engine torch cannot run zero3: torch.distributed has it as FSDP, cut by rows. Use strategy fsdp.",
        ["mesh.dp.strategy=fsdp", "engine=native"],
    ),
}


def tree(settings: str) -> dict[str, Any]:
    """`a.b=1 a.c=x` as a config."""
    made: dict[str, Any] = {"model": {"layers": 6}}
    for item in settings.split():
        (*path, last), value = item.partition("=")[0].split("."), item.partition("=")[2]
        inner = made
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = int(value) if value.isdigit() else {"True": True, "False": False}.get(value, value)
    return made


@pytest.mark.parametrize("name", TABLE)
def test_what_cannot_be_is_refused_with_what_can(name: str) -> None:
    settings, said, fixes = TABLE[name]
    with pytest.raises(SandboxError) as caught:
        plan(check(Config, tree(settings)))
    assert str(caught.value) == said
    assert caught.value.exit_code == 2
    for fix in fixes:
        plan(check(Config, tree(f"{settings} {fix}")))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_as_many_stages_as_parts_is_the_limit_and_any_number_of_microbatches_will_do(schedule: str) -> None:
    each = 2 if schedule in (*LOOPED, *VS) else 1
    settings = f"mesh.pp.degree=4 mesh.pp.schedule={schedule} model.layers={{}} train.microbatches={{}}"
    for microbatches in (1, 2, 3, 5, 16):
        plan(check(Config, tree(settings.format(4 * each - 2, microbatches))))
    with pytest.raises(SandboxError, match=r"Set model\.layers"):
        plan(check(Config, tree(settings.format(4 * each - 3, 1))))
