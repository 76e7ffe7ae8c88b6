"""Context parallelism: its arithmetic against plain attention in one process, then worlds against the unsharded run."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from batches import make
from torch import Tensor

from sandbox import blockwise
from sandbox.batch import Batch
from sandbox.blockwise import Backward, Forward, Share
from sandbox.config import Data, Model
from sandbox.mesh import Mesh
from sandbox.model import attend, build, visible
from sandbox.plan import find, predict
from sandbox.predict import Prediction
from sandbox.runtime import launch
from sandbox.verify import Case, Verdict
from sandbox.verify.cases import case
from sandbox.verify.faults import FAULTS

context = importlib.import_module("sandbox.strategies.context")

UNIT, PARITY = pytest.mark.unit, pytest.mark.parity
ORDERS = ("zigzag", "contiguous")


BATCHES = {
    "plain": make([23], [23]),
    "packed": make([3, 9, 11], [23], [1] * 23),
    "padded": make([23], [4], [2, 12]),
}


def shares(batch: Batch, ranks: int, order: str) -> list[Share]:
    columns = context.columns(len(batch.columns), ranks, order)
    return [Share.of(batch, columns, rank) for rank in range(ranks)]


def by_blocks(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, batch: Batch, ranks: int, order: str) -> list[Tensor]:
    """What all ranks together make of the whole: the result and the gradients of q, k and v."""
    parts = shares(batch, ranks, order)
    blocks = [torch.stack((k, v))[:, :, :, columns] for columns in parts[0].columns_of]
    kv_grads = [torch.zeros_like(block, dtype=torch.promote_types(q.dtype, torch.float32)) for block in blocks]
    out, dq = torch.empty_like(q), torch.empty_like(q)
    for rank, part in enumerate(parts):
        columns = part.columns_of[rank]
        order_of_arrival = [(rank - step) % ranks for step in range(ranks)]
        forward = Forward(q[:, :, columns])
        for source in order_of_arrival:
            forward.add(blocks[source], part.tiles[source])
        out[:, :, columns], lse = forward.result()
        backward = Backward(q[:, :, columns], out[:, :, columns], lse, grad[:, :, columns])
        for source in order_of_arrival:
            kv_grads[source] += backward.add(blocks[source], part.tiles[source])
        dq[:, :, columns] = backward.result().to(q.dtype)
    dk, dv = torch.cat(kv_grads, dim=3)[:, :, :, torch.cat(list(parts[0].columns_of)).argsort()]
    return [out, dq, dk, dv]


def plainly(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, batch: Batch) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = attend(*inputs, batch)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Arithmetic


@UNIT
@pytest.mark.parametrize(("tile", "fused"), [(2, True), (512, True), (3, False)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", BATCHES)
def test_attention_by_blocks_is_attention(
    kind: str, ranks: int, order: str, groups: int, tile: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "TILE", tile)
    monkeypatch.setattr(blockwise, "fused", lambda tensor: fused)
    batch = BATCHES[kind]
    rows, size = batch.tokens.shape
    q, grad = (random(rows, 4, size, 6, seed=seed) for seed in (0, 1))
    k, v = (random(rows, groups, size, 6, seed=seed) for seed in (2, 3))
    for found, expected in zip(
        by_blocks(q, k, v, grad, batch, ranks, order), plainly(q, k, v, grad, batch), strict=True
    ):
        assert (found - expected).abs().max() <= 1e-14 * expected.abs().max()


@UNIT
def test_heads_may_lie_in_memory_as_they_like() -> None:
    """The kernel takes a head's elements to be side by side. Those of heads of two came otherwise."""
    (share,) = shares(BATCHES["packed"], 1, "zigzag")
    q, k, v, grad = (random(3, 10, 2, 23, seed=seed).mT for seed in range(4))
    kv = torch.stack((k, v)).mT.contiguous().mT
    forward = Forward(q)
    forward.add(kv, share.tiles[0])
    backward = Backward(q, *forward.result(), grad)
    dk, dv = backward.add(kv, share.tiles[0])
    found = forward.result()[0], backward.result(), dk, dv
    for mine, expected in zip(found, plainly(q, k, v, grad, share), strict=True):
        assert (mine - expected).abs().max() <= 1e-14 * expected.abs().max()


@UNIT
def test_scores_too_large_for_an_exponential_do_no_harm() -> None:
    batch = BATCHES["packed"]
    q, k, v, grad = (random(3, 2, 23, 4, seed=seed) for seed in range(4))
    q, k = 100 * q, 100 * k  # scores of some 10,000, where exp ends at 709
    for found, expected in zip(
        by_blocks(q, k, v, grad, batch, 3, "zigzag"), plainly(q, k, v, grad, batch), strict=True
    ):
        assert found.isfinite().all()
        assert (found - expected).abs().max() <= 1e-9


@UNIT
def test_bfloat16_adds_up_in_float32() -> None:
    """As near to the truth as plain attention in bfloat16, however many blocks there are."""
    batch = BATCHES["plain"]
    tensors = [random(2, 2, 23, 8, seed=seed).bfloat16() for seed in range(4)]
    truth = plainly(*(tensor.double() for tensor in tensors), batch)
    found, usual = by_blocks(*tensors, batch, 5, "contiguous"), plainly(*tensors, batch)
    assert found[2].dtype == torch.float32, "gradients of keys travel wide"
    for mine, theirs, right in zip(found, usual, truth, strict=True):
        assert (mine - right).abs().max() <= 1.5 * (theirs - right).abs().max()


@UNIT
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("sequence", "ranks"), [(24, 2), (24, 8), (23, 4), (5, 4), (8, 8), (64, 1)])
def test_each_column_has_one_rank_and_ranks_are_of_a_size(sequence: int, ranks: int, order: str) -> None:
    columns = context.columns(sequence, ranks, order)
    assert torch.cat(columns).sort().values.tolist() == list(range(sequence))
    sizes = [len(part) for part in columns]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@UNIT
def test_zigzag_shares_the_scores_out_evenly_and_contiguous_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(order: str) -> list[int]:
        parts = shares(make([32]), 4, order)
        seen = [int(visible(part, part.whole).sum()) for part in parts]
        assert seen == [sum(_seen(tile) for tiles in part.tiles for tile in tiles) for part in parts]
        return seen

    def _seen(tile: blockwise.Tile) -> int:
        rows, columns = (span.stop - span.start for span in (tile.queries, tile.keys))
        assert tile.hidden is None, "work is as much as is seen"
        return rows * (rows + 1) // 2 if tile.triangle else rows * columns

    monkeypatch.setattr(blockwise, "TILE", 4)
    assert scores("zigzag") == [132] * 4
    assert scores("contiguous") == [36, 100, 164, 228]


@UNIT
def test_a_block_that_no_query_may_see_is_not_computed() -> None:
    first, last = (shares(make([32]), 4, "contiguous")[rank] for rank in (0, 3))
    assert [len(tiles) for tiles in first.tiles] == [1, 0, 0, 0]
    assert [len(tiles) for tiles in last.tiles] == [1, 1, 1, 1]
    assert [tile.triangle for tiles in last.tiles for tile in tiles] == [False, False, False, True]
    apart = shares(make([8, 8, 8, 8]), 4, "contiguous")
    assert [[len(tiles) for tiles in part.tiles] for part in apart] == torch.eye(4).int().tolist()


@UNIT
def test_a_share_remembers_the_same_rows_of_the_other_columns() -> None:
    share = shares(BATCHES["packed"], 3, "zigzag")[1].split_rows(2)[1].to(torch.device("cpu"))
    assert isinstance(share, Share)
    assert share.rows.tolist() == share.whole.rows.tolist() == [2]
    assert share.columns.tolist() == share.columns_of[1].tolist()
    assert torch.equal(share.positions, share.whole.positions[:, share.columns])


@UNIT
@pytest.mark.parametrize(
    ("heads", "groups", "ranks", "expected"),
    [
        (8, 4, 2, [(0, 2), (2, 4)]),
        (8, 2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (4, 1, 4, [(0, 1)] * 4),
        (6, 2, 3, [(0, 1), (0, 2), (1, 2)]),
    ],
)
def test_each_rank_gets_the_keys_of_its_queries(
    heads: int, groups: int, ranks: int, expected: list[tuple[int, int]]
) -> None:
    assert [(span.start, span.stop) for span in context.head_spans(heads, groups, ranks)] == expected


# Bytes


def sent(rank: int, options: dict[str, Any], dtype: str = "float64") -> dict[str, float]:
    """By rank `rank` of four along cp, two along dp: 3 rows of 5, 10 columns of 37, 4 heads of 2 groups, 3 layers."""
    mesh = {"dp": {"degree": 2}, "cp": {"degree": 4, "order": "contiguous", **options}}
    model = Model(layers=3, width=24, heads=4, kv_heads=2)
    config = case(
        "native", "", mesh, model=model, data=Data(sequence=37), train={"batch": 5, "microbatches": 1}, dtype=dtype
    ).config
    strategy = find("native", "context")
    made: Prediction = strategy.predict(
        build(model, dtype), Mesh(config.mesh.degrees, rank), strategy.Options(order="contiguous", **options), config
    )
    assert not made.memory
    return dict(made.traffic)


@UNIT
@pytest.mark.parametrize(
    ("rank", "options", "dtype", "expected"),
    [
        # rank 0 has 10 columns, the others 9. 3 layers x 3 rows x 2 (k, v) x 2 groups x 6 = 216 elements a column
        (0, {"kind": "ring"}, "float64", {"send cp": 216 * (28 + 28 + 27) * 8}),  # block 1 is not passed on
        (3, {"kind": "ring"}, "float64", {"send cp": 216 * (27 + 27 + 28) * 8}),  # nor block 0 by rank 3
        (0, {"kind": "ring"}, "bfloat16", {"send cp": 216 * (28 * 2 + 28 * 2 + 27 * 4)}),
        (0, {"kind": "gather"}, "float64", {"all_gather cp": 216 * 30 * 8, "reduce_scatter cp": 216 * 27 * 8}),
        (1, {"kind": "gather"}, "bfloat16", {"all_gather cp": 216 * 27 * 2, "reduce_scatter cp": 216 * 28 * 2}),
        # one head of queries and one group of keys and values a rank: 3 heads go, 1 comes back, and the same backward
        (0, {"kind": "ulysses"}, "float64", {"all_to_all cp": 3 * 3 * 6 * (3 * 30 + 27 + 30 + 3 * 27) * 8}),
    ],
)
def test_bytes_by_hand(rank: int, options: dict[str, Any], dtype: str, expected: dict[str, float]) -> None:
    assert sent(rank, options, dtype) == expected


# Worlds


def held(config: Case) -> Verdict:
    verdict = world.verifier().verify(config)
    assert verdict.status == "held", verdict.cause
    if config.config.train.dtype == "float64":
        assert max(d.error for d in (*verdict.gradients, *verdict.parameters)) <= world.EXACT
    for amount in (*verdict.traffic.values(), *verdict.memory.values()):
        assert amount.measured == amount.predicted
    return verdict


CP = {"ring": {"kind": "ring"}, "gather": {"kind": "gather"}, "ulysses": {"kind": "ulysses"}}


@PARITY
@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("gather", {"cp": {"degree": 8, "order": "contiguous"}}),
        ("ring", {"cp": {"degree": 3, "order": "contiguous"}, "dp": {"degree": 2, "strategy": "zero3"}}),
        ("gather", {"cp": {"degree": 4}, "dp": {"degree": 2, "replicas": 2, "strategy": "zero2"}}),
        ("ulysses", {"cp": {"degree": 4}, "dp": {"degree": 2, "strategy": "zero1"}}),
    ],
)
def test_larger_worlds_have_parity(kind: str, mesh: dict[str, Any]) -> None:
    held(case("native", "", {**mesh, "cp": {**mesh["cp"], **CP[kind]}}))


@PARITY
@pytest.mark.parametrize("kind", CP)
def test_columns_that_do_not_divide_have_parity(kind: str) -> None:
    held(case("native", "", {"cp": {"degree": 4, "order": "contiguous", **CP[kind]}}, data=Data(sequence=23)))


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Many to a row of a batch, of all lengths from 1 to beyond a row."""
    folder = tmp_path_factory.mktemp("documents")
    files = [folder / f"{number:03}.txt" for number in range(300)]
    for number, file in enumerate(files):
        file.write_text("".join(chr(97 + (number * place) % 26) for place in range(1 + number * 7 % 31)))
    return tuple(files)


@PARITY
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", CP)
def test_many_documents_in_a_row_have_parity(kind: str, order: str, short_documents: tuple[Path, ...]) -> None:
    data = Data(sequence=24, files=short_documents)
    held(case("native", "", {"cp": {"degree": 2, "order": order, **CP[kind]}}, data=data))


@PARITY
@pytest.mark.parametrize("kind", CP)
def test_tiles_smaller_than_a_block_have_parity(kind: str) -> None:
    data, model = Data(sequence=1100), Model(layers=1, width=8, heads=2, kv_heads=1)
    train = {"batch": 2, "microbatches": 1}
    held(
        case(
            "native", "", {"cp": {"degree": 2, "order": "contiguous", **CP[kind]}}, data=data, model=model, train=train
        )
    )


@PARITY
@pytest.mark.parametrize(("heads", "groups", "degree"), [(6, 2, 3), (4, 1, 4), (4, 4, 2), (6, 3, 2)])
def test_ulysses_deals_out_heads_of_any_number_of_groups(heads: int, groups: int, degree: int) -> None:
    model = Model(layers=2, width=24, heads=heads, kv_heads=groups, qk_norm=True, bias=True)
    held(case("native", "", {"cp": {"degree": degree, "kind": "ulysses"}}, model=model))


@PARITY
@pytest.mark.parametrize("kind", CP)
def test_bfloat16_has_parity_within_its_noise(kind: str) -> None:
    mesh = {"dp": {"degree": 2, "strategy": "fsdp"}, "cp": {"degree": 2, **CP[kind]}}
    held(case("native", "", mesh, dtype="bfloat16"))


@PARITY
@pytest.mark.parametrize("kind", CP)
def test_all_ranks_report_the_loss_of_the_whole_batch(kind: str) -> None:
    """In training and in validation, which must leave the next step alone."""
    config = case("native", "", {"dp": {"degree": 2, "strategy": "zero3"}, "cp": {"degree": 2, **CP[kind]}}).config
    alone = launch(1, world.losses, config.reference(), timeout=world.TIMEOUT)[0]
    for rank in launch(4, world.losses, config, timeout=world.TIMEOUT):
        assert rank == pytest.approx(alone, rel=world.EXACT)


@UNIT
def test_prediction_folds_with_any_data_strategy() -> None:
    mesh = {"dp": {"degree": 2, "strategy": "zero3"}, "cp": {"degree": 2}}
    ranks = predict(case("native", "", mesh).config)
    assert len(ranks) == 4
    assert all(
        set(rank.traffic) == {"send cp", "all_gather dp_shard x cp", "reduce_scatter dp_shard x cp"} for rank in ranks
    )


# Faults


MINE = [fault for fault in FAULTS.values() if fault.strategy >= "context"]


@UNIT
def test_the_catalogue_of_context_is_planted() -> None:
    assert {fault.number for fault in MINE} >= {6, 49, 50, 51, 52, 53, 54}
