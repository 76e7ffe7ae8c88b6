"""Bugs of context parallelism, planted in the cut of the columns, in the mask, and in the ring."""

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sandbox import blockwise
from sandbox.batch import IGNORED, Batch
from sandbox.blockwise import Backward, Forward, Tile
from sandbox.data import Corpus
from sandbox.model import attention, dropout
from sandbox.ring import Ring
from sandbox.strategies import context
from sandbox.trainer import Trainer
from sandbox.verify.cases import DATA, TRAIN
from sandbox.verify.faults.planting import change, change_loss, fault, patch


def _first_seed() -> int:
    """The first seed by which a loss of the first step is of a row's second document: texts differ between Pythons."""
    corpus = Corpus.load(DATA.model_copy(update={"mask": "ragged"}))
    batches = ((seed, corpus.batch(0, seed=seed, rows=TRAIN.batch)) for seed in itertools.count())
    return next(seed for seed, batch in batches if ((batch.documents > 0) & (batch.targets != IGNORED)).any())


SEED = _first_seed()


@fault(6, "NVIDIA/Megatron-LM/issues/906", "scale", "context", 4)
def scaled_for_an_average_over_cp(trainer: Trainer) -> None:
    """The loss is scaled by cp for an average over cp that is a sum."""
    change_loss(trainer, lambda loss, batch, valid: loss * trainer.config.mesh.cp.degree / valid)


@fault(49, "NVIDIA-BioNeMo/bionemo-recipes/pull/1449", "data", "context")
def targets_shifted_after_the_cut(trainer: Trainer) -> None:
    """Each rank shifts its own tokens to have targets, so where a chunk ends they are another chunk's, or none."""
    shard = trainer.program.shard_batch

    def shifted(batch: Batch) -> Batch:
        mine = shard(batch)
        targets = mine.tokens.roll(-1, dims=1).masked_fill(mine.targets == IGNORED, IGNORED)
        targets[:, -1] = IGNORED
        return replace(mine, targets=targets)

    change(trainer, shard_batch=shifted)


@fault(50, "NVIDIA/Megatron-LM/pull/1612", "forward", "context", options={"order": "contiguous"})
def positions_counted_from_the_cut(trainer: Trainer) -> None:
    """Rotary angles are those of each rank's own columns, counted from 0."""
    angles = attention._angles

    def local(batch: Batch, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        own = torch.arange(len(batch.columns)).expand_as(batch.positions)
        return angles(replace(batch, positions=own), width, dtype)

    patch(attention, "_angles", local)


@fault(51, "huggingface/accelerate/pull/4177", "forward", "context", 3, options={"kind": "gather"})
def every_block_causal(trainer: Trainer) -> None:
    """Each block is masked as if it were the query's own."""

    def triangle(queries: Batch, keys: Batch) -> Tensor:
        size = max(len(queries.columns), len(keys.columns))
        whole = torch.ones(len(queries.rows), 1, size, size, dtype=torch.bool).tril()
        return whole[:, :, : len(queries.columns), : len(keys.columns)]

    patch(blockwise, "told", lambda queries, keys: None)
    patch(blockwise, "visible", triangle)


@fault(51, "huggingface/trl/pull/6843", "forward", "context", train={"seed": SEED})
def documents_see_each_other(trainer: Trainer) -> None:
    """The mask of documents is dropped: what comes earlier in the row is seen."""

    def earlier(queries: Batch, keys: Batch) -> Tensor:
        seen = keys.columns <= queries.columns[:, None]
        return seen.expand(len(queries.rows), 1, -1, -1)

    patch(blockwise, "told", lambda queries, keys: None)
    patch(blockwise, "visible", earlier)


@fault(52, "jzhang38/EasyContext/issues/14", "forward", "context", 3)
def earlier_sums_not_scaled_down(trainer: Trainer) -> None:
    """When a block's result is added, the one so far keeps its old scale."""
    merge = blockwise.merge

    def stale(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
        lost = out * (1 - (lse - lse.logaddexp(more_lse)).exp())[..., None]
        merge(out, lse, more, more_lse)
        out.add_(lost)

    patch(blockwise, "merge", stale)


@fault(52, "zhuzilin/ring-flash-attention/issues/42", "precision", "context", 4)
def merged_in_bfloat16(trainer: Trainer) -> None:
    """After each block, what there is of the result is rounded to bfloat16."""
    add = Forward.add

    def rounded(forward: Forward, kv: Tensor, tiles: list[Tile]) -> None:
        add(forward, kv, tiles)
        forward._out.copy_(forward._out.bfloat16())

    patch(Forward, "add", rounded)


@fault(53, "NVIDIA/Megatron-LM/issues/1464", "backward", "context", 3)
def gradients_of_keys_do_not_come_home(trainer: Trainer) -> None:
    """The last hop of a block's gradients is skipped: its keys have what their own rank gave them, and no more."""
    add, backward = Backward.add, Ring.backward
    parts: list[Tensor] = []

    def noted(way: Backward, kv: Tensor, tiles: list[Tile]) -> Tensor:
        part = add(way, kv, tiles)
        parts.append(part.clone())
        return part

    def without_the_last_hop(ctx: Any, grad: Tensor) -> Any:
        parts.clear()
        dq, _, *none = backward(ctx, grad)
        return dq, parts[0], *none

    patch(Backward, "add", noted)
    patch(Ring, "backward", staticmethod(without_the_last_hop))


@fault(54, "axolotl-ai-cloud/axolotl/pull/3498", "data", "context")
def columns_cut_twice(trainer: Trainer) -> None:
    """The loader has cut the columns already when the strategy cuts them."""
    shard, axis = trainer.program.shard_batch, trainer.mesh.axis("cp")

    def twice(batch: Batch) -> Batch:
        mine = torch.arange(len(batch.columns)).tensor_split(axis.size)[axis.rank]
        return shard(batch.take_columns(mine))

    change(trainer, shard_batch=twice)


@fault(47, "InternLM/InternLM/pull/405", "forward", "context")
def every_part_of_a_row_drops_alike(trainer: Trainer) -> None:
    """Ranks of cp draw masks of dropout from the same seed, each for its own columns, counted from 0."""
    kept = dropout.kept

    def local(batch: Batch, *where: Any) -> Tensor:
        return kept(replace(batch, columns=torch.arange(len(batch.columns))), *where)

    patch(dropout, "kept", local)


@fault(49, "modelscope/ms-swift/pull/10071", "data", "context", 3)
def targets_cut_in_the_other_order(trainer: Trainer) -> None:
    """Tokens are cut in zigzag, targets in rank order."""
    shard, axis = trainer.program.shard_batch, trainer.mesh.axis("cp")

    def misaligned(batch: Batch) -> Batch:
        mine = context.columns(len(batch.columns), axis.size, "contiguous")[axis.rank]
        return replace(shard(batch), targets=batch.targets[:, mine])

    change(trainer, shard_batch=misaligned)


@fault(53, "huggingface/diffusers/issues/14265", "backward", "context", 3)
def backward_rereads_the_first_block(trainer: Trainer) -> None:
    """Blocks go round in backward too, but gradients are those of the keys that forward kept: the rank's own."""
    add = Backward.add

    def stale(way: Backward, kv: Tensor, tiles: list[Tile]) -> Tensor:
        return add(way, way.__dict__.setdefault("first", kv), tiles)

    patch(Backward, "add", stale)


@fault(65, "deepspeedai/DeepSpeed/pull/8317", "forward", "context", options={"kind": "ulysses"})
def heads_come_back_out_of_order(trainer: Trainer) -> None:
    """After attention the ranks' heads are put together in another order than they were dealt out in."""
    exchange, calls = context.exchange, itertools.count()

    def reordered(*args: Any) -> tuple[Tensor, ...]:
        came = exchange(*args)
        return came[::-1] if next(calls) % 2 else came

    patch(context, "exchange", reordered)
