"""A plan that cannot be is refused before anything starts, by a message that names the field and what would work.

Each row: the settings, what is said of them, and settings that would work. These must be accepted, and so must all
that the message advises.
"""

import pytest
from advice import advised, changed, settings

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
        "model.heads 5 does not divide model.width 12. Those that do: 1, 2, 3, 6. Or set model.width: 10.",
        ["model.heads=4 model.rotary=false"],
    ),
    "heads of which some share keys": (
        "model.width=96 model.heads=7 model.kv_heads=4",
        "model.heads 7 does not divide model.width 96. Those that do: 4, 8, 12, 16, 24, 48.",
        ["model.kv_heads=null model.heads=6"],
    ),
    "key/value heads": (
        "model.heads=4 model.kv_heads=3",
        "model.kv_heads 3 does not divide model.heads 4. Those that do: 1, 2, 4.",
        ["model.kv_heads=1", "model.kv_heads=2", "model.kv_heads=4"],
    ),
    "odd heads": (
        "model.width=12 model.heads=4",
        "model.rotary needs an even head width, but model.width / model.heads = 3. "
        "Set model.rotary: false, or model.width: 16, or model.heads: 1 or 2 or 3 or 6.",
        [],
    ),
    "odd width": (
        "model.width=9 model.heads=3",
        "model.rotary needs an even head width, but model.width / model.heads = 3. "
        "Set model.rotary: false, or model.width: 12.",
        [],
    ),
    # rows
    "batch": (
        "mesh.dp.degree=4 train.batch=11 train.microbatches=3",
        "train.batch 11 leaves a rank without a row: mesh.dp.degree 4 x train.microbatches 3 need at least 12. "
        "Set train.batch: 12, or train.microbatches: 2.",
        [],
    ),
    "batch of a pipeline": (
        "mesh.pp.degree=2 train.batch=3 train.microbatches=4",
        "train.batch 3 leaves a rank without a row: mesh.dp.degree 1 x train.microbatches 4 need at least 4. "
        "Set train.batch: 4, or train.microbatches: 3.",
        [],
    ),
    "replicas": (
        "mesh.dp.degree=4 mesh.dp.replicas=3 mesh.dp.strategy=fsdp",
        "mesh.dp.replicas 3 does not divide mesh.dp.degree 4. Those that do: 1, 2, 4.",
        [],
    ),
    "replicas, and experts are cut too": (
        "mesh.dp.degree=8 mesh.dp.replicas=3 mesh.ep.degree=4 model.experts=4",
        "mesh.dp.replicas 3 does not divide mesh.dp.degree 8. Those that do: 1, 2.",
        [],
    ),
    # experts
    "experts of a token": (
        "model.experts=1",
        "model.top_k 2 is more than model.experts 1. Set model.top_k: 1 with model.renormalise: false.",
        ["model.experts=2"],
    ),
    "experts over one data rank": (
        "mesh.ep.degree=2 model.experts=4",
        "mesh.ep.degree 2 does not divide mesh.dp.degree 1: experts are cut over data ranks. Those that do: 1. "
        "Or set mesh.dp.degree: 2.",
        [],
    ),
    "experts over each replica": (
        "mesh.dp.degree=4 mesh.dp.replicas=2 mesh.ep.degree=4 model.experts=4",
        "mesh.ep.degree 4 does not divide mesh.dp.degree / mesh.dp.replicas 2: experts are cut over data ranks. "
        "Those that do: 1, 2. Or set mesh.dp.degree: 8, or mesh.dp.replicas: 1.",
        [],
    ),
    "more ranks than experts": (
        "mesh.dp.degree=4 mesh.ep.degree=4 model.experts=3",
        "mesh.ep.degree 4 is more than model.experts 3. Set model.experts: 4, or mesh.ep.degree: 2.",
        [],
    ),
    "the one expert": (
        "model.experts=1 model.top_k=1",
        "model.top_k 1 with model.renormalise makes every gate weight 1, and the router has no gradient of the loss. "
        "Set model.renormalise: false.",
        [],
    ),
    # columns
    "sequence": (
        "mesh.cp.degree=8 data.sequence=6",
        "data.sequence 6 leaves a rank without a column: mesh.cp.degree is 8. "
        "Set data.sequence: 8, or mesh.cp.degree: 6.",
        [],
    ),
    "sequence, and tp cuts it too": (
        "mesh.cp.degree=4 mesh.tp.degree=2 mesh.tp.sequence=True data.sequence=7",
        "mesh.tp.degree 2 is more than data.sequence / mesh.cp.degree 1. Degrees that do: 1.",
        ["data.sequence=8"],
    ),
    "sequence shorter than cp, and tp cuts it too": (
        "mesh.cp.degree=4 mesh.tp.degree=2 mesh.tp.sequence=True data.sequence=3",
        "data.sequence 3 leaves a rank without a column: mesh.cp.degree is 4. "
        "Set data.sequence: 8, or mesh.cp.degree: 1.",
        [],
    ),
    "heads for ulysses": (
        "mesh.cp.degree=3 mesh.cp.kind=ulysses",
        "mesh.cp.degree 3 does not divide model.heads 4, as mesh.cp.kind ulysses needs. "
        "Degrees that do: 1, 2, 4. Or set mesh.cp.kind: ring or gather.",
        [],
    ),
    "heads for ulysses, and few columns": (
        "mesh.cp.degree=3 mesh.cp.kind=ulysses data.sequence=3",
        "mesh.cp.degree 3 does not divide model.heads 4, as mesh.cp.kind ulysses needs. "
        "Degrees that do: 1, 2. Or set mesh.cp.kind: ring or gather.",
        [],
    ),
    "columns for ulysses": (
        "mesh.cp.degree=4 mesh.cp.kind=ulysses data.sequence=3",
        "data.sequence 3 leaves a rank without a column: mesh.cp.degree is 4. "
        "Set data.sequence: 4, or mesh.cp.degree: 2.",
        ["mesh.cp.kind=ring mesh.cp.degree=3"],
    ),
    "heads for ulysses of each rank of tp": (
        "mesh.cp.degree=4 mesh.cp.kind=ulysses mesh.tp.degree=2",
        "mesh.cp.degree 4 does not divide the heads of each rank of tp, as mesh.cp.kind ulysses needs: of "
        "model.heads 4 ranks have 2, 2. Set mesh.cp.kind: ring, or mesh.cp.degree: 2, or mesh.tp.degree: 1.",
        ["model.heads=8"],
    ),
    "heads for ulysses that tp deals out unevenly": (
        "mesh.cp.degree=2 mesh.cp.kind=ulysses mesh.tp.degree=3 model.heads=8",
        "mesh.cp.degree 2 does not divide the heads of each rank of tp, as mesh.cp.kind ulysses needs: of "
        "model.heads 8 ranks have 3, 3, 2. Set mesh.cp.kind: ring, or mesh.tp.degree: 1 or 2 or 4.",
        ["mesh.cp.kind=gather"],
    ),
    # features
    "heads for tp": (
        "mesh.tp.degree=5",
        "mesh.tp.degree 5 is more than model.heads 4. Degrees that do: 1 to 4.",
        [],
    ),
    "features for tp": (
        "mesh.tp.degree=4 model.hidden=3",
        "mesh.tp.degree 4 is more than model.hidden 3. Degrees that do: 1 to 3.",
        [],
    ),
    "heads and features for tp": (
        "mesh.tp.degree=5 model.hidden=3",
        "mesh.tp.degree 5 is more than model.hidden 3. Degrees that do: 1 to 3.",
        [],
    ),
    "heads for tp, of which each rank shares some by ulysses": (
        "mesh.tp.degree=9 mesh.cp.degree=2 mesh.cp.kind=ulysses model.heads=8",
        "mesh.tp.degree 9 is more than model.heads 8. Degrees that do: 1, 2, 4.",
        ["mesh.cp.kind=ring mesh.tp.degree=8"],
    ),
    "features for torch's tp": (
        "engine=torch mesh.tp.degree=4 model.hidden=5",
        "mesh.tp.degree 4 leaves a rank without a part of model.hidden 5. Degrees that do: 1, 2.",
        ["engine=native"],
    ),
    "heads for torch's tp, and few features": (
        "engine=torch mesh.tp.degree=3 model.hidden=5",
        "mesh.tp.degree 3 does not divide model.heads 4, and engine torch's DTensors cannot be viewed as uneven parts. "
        "Degrees that do: 1, 2. Engine native needs none to divide.",
        ["engine=native"],
    ),
    # stages
    "stages": (
        "mesh.pp.degree=8 model.layers=3",
        "mesh.pp.degree 8 with 1 stage on each rank needs 8 parts, but embedding, 3 layers and head are 5. "
        "Set model.layers: 6, or mesh.pp.degree: 5.",
        [],
    ),
    "stages of a V": (
        "mesh.pp.degree=4 mesh.pp.schedule=zbv model.layers=3",
        "mesh.pp.degree 4 with 2 stages on each rank needs 8 parts, but embedding, 3 layers and head are 5. "
        "Set model.layers: 6, or mesh.pp.degree: 2.",
        [],
    ),
    "many stages a rank": (
        "mesh.pp.degree=2 mesh.pp.schedule=interleaved mesh.pp.stages=4 model.layers=3",
        "mesh.pp.degree 2 with 4 stages on each rank needs 8 parts, but embedding, 3 layers and head are 5. "
        "Set model.layers: 6, or mesh.pp.stages: 2.",
        [],
    ),
    "one stage a rank": (
        "mesh.pp.degree=2 mesh.pp.schedule=zb_h1 mesh.pp.stages=2",
        "mesh.pp.stages 2: schedule zb_h1 has 1 on each rank. "
        "Set mesh.pp.stages: 1, or mesh.pp.schedule: interleaved or breadth_first.",
        [],
    ),
    "one stage a rank, and too few parts for more": (
        "mesh.pp.degree=4 mesh.pp.schedule=gpipe mesh.pp.stages=3",
        "mesh.pp.stages 3: schedule gpipe has 1 on each rank. Set mesh.pp.stages: 1.",
        ["mesh.pp.schedule=interleaved mesh.pp.stages=2"],
    ),
    "microbatches for torch's 1f1b": (
        "engine=torch mesh.pp.degree=4 train.microbatches=2",
        "train.microbatches 2: torch's 1F1B needs one for each of 4 stages. "
        "Set mesh.pp.schedule: gpipe, or train.microbatches: 4.",
        ["engine=native"],
    ),
    "microbatches for torch's 1f1b, and rows for them": (
        "engine=torch mesh.pp.degree=4 mesh.dp.degree=2 train.microbatches=2 train.batch=5",
        "train.microbatches 2: torch's 1F1B needs one for each of 4 stages. "
        "Set mesh.pp.schedule: gpipe, or train.microbatches: 4 with train.batch: 8.",
        ["engine=native"],
    ),
    "microbatches for torch's interleaved": (
        "engine=torch mesh.pp.degree=2 mesh.pp.schedule=interleaved train.microbatches=5",
        "train.microbatches 5: torch's Interleaved1F1B runs them in 2 rounds of equal size over 2 ranks. "
        "Set train.microbatches: 4.",
        ["engine=native"],
    ),
    # names
    "schedule": (
        "mesh.pp.degree=2 mesh.pp.schedule=2f2b",
        "mesh.pp.schedule: '2f2b' is not one of 'gpipe', '1f1b', 'interleaved', 'breadth_first', 'zb_h1', 'zbv' "
        "or 'dualpipe_v'.",
        [],
    ),
    "order": (
        "mesh.cp.degree=2 mesh.cp.order=zickzack",
        "mesh.cp.order: 'zickzack' is not one of 'zigzag' or 'contiguous'.",
        [],
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
        "mesh.tp.strategy: zero1 belongs to mesh.dp. Set mesh.tp.strategy: tensor.",
        ["mesh.tp.strategy=tensor mesh.dp.degree=2 mesh.dp.strategy=zero1"],
    ),
    "two strategies for the data axis": (
        "mesh.dp.degree=2 mesh.pp.degree=2 mesh.pp.strategy=fsdp",
        "mesh.pp.strategy: fsdp belongs to mesh.dp. Set mesh.pp.strategy: pipeline.",
        ["mesh.pp.strategy=pipeline mesh.dp.strategy=fsdp"],
    ),
    "as many replicas as ranks": (
        "engine=torch mesh.dp.degree=4 mesh.dp.strategy=fsdp mesh.dp.replicas=4",
        "mesh.dp.replicas 4: with as many replicas as ranks, fsdp has nothing to cut. "
        "Set mesh.dp.replicas: 1, or mesh.dp.strategy: ddp.",
        [],
    ),
    "tp beside torch's zero1": (
        "engine=torch mesh.dp.degree=2 mesh.dp.strategy=zero1 mesh.tp.degree=2",
        "mesh.tp: torch's ZeroRedundancyOptimizer broadcasts plain tensors, not the DTensors that other axes make of "
        "parameters. Set mesh.dp.strategy: fsdp, or ddp.",
        ["engine=native"],
    ),
    "strategy that an engine lacks": (
        "engine=torch mesh.dp.degree=2 mesh.dp.strategy=zero3",
        "engine torch cannot run zero3: torch.distributed has it as FSDP, cut by rows. Use strategy fsdp.",
        ["mesh.dp.strategy=fsdp", "engine=native"],
    ),
}


SIX_LAYERS = {"model": {"layers": 6}}


@pytest.mark.parametrize("name", TABLE)
def test_what_cannot_be_is_refused_with_what_can(name: str) -> None:
    wrong, said, others = TABLE[name]
    tree = changed(SIX_LAYERS, settings(wrong))
    with pytest.raises(SandboxError) as caught:
        plan(check(Config, tree))
    assert str(caught.value) == said
    assert caught.value.exit_code == 2
    fixes = [*advised(said), *map(settings, others)]
    assert fixes, "it says what is wrong, and not what to do"
    for fix in fixes:
        plan(check(Config, changed(tree, fix)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_as_many_stages_as_parts_is_the_limit_and_any_number_of_microbatches_will_do(schedule: str) -> None:
    each = 2 if schedule in (*LOOPED, *VS) else 1
    wanted = f"mesh.pp.degree=4 mesh.pp.schedule={schedule} model.layers={{}} train.microbatches={{}}"
    for microbatches in (1, 2, 3, 5, 16):
        plan(check(Config, changed({}, settings(wanted.format(4 * each - 2, microbatches)))))
    with pytest.raises(SandboxError, match=r"Set model\.layers"):
        plan(check(Config, changed({}, settings(wanted.format(4 * each - 3, 1)))))
