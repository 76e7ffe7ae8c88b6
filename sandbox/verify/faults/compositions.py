"""Bugs that need two axes: a sum over the wrong ranks, or one taken before another strategy is done."""

from collections.abc import Sequence

import torch
from torch import nn

from sandbox import buckets
from sandbox.comm import all_reduce
from sandbox.stages import WeightsLater, completed
from sandbox.strategies import ddp, pipeline
from sandbox.trainer import Trainer
from sandbox.verify.faults.planting import at_once, change, change_loss, fault, patch

BESIDE = {"dp": {"degree": 2, "strategy": "ddp"}}
REPLICAS = {"dp": {"degree": 4, "replicas": 2, "strategy": "fsdp"}}


@fault(26, "meta-pytorch/torchrec/pull/4758", "reduction", "pipeline", beside=BESIDE)
def reduced_after_the_last_forward(trainer: Trainer) -> None:
    """Reduction starts in the backward pass after the last forward one; what later ones add stays on each rank."""
    reduce_grads = trainer.program.reduce_grads
    rank, ranks = trainer.mesh.axis("pp").rank, trainer.mesh.axis("pp").size
    params = trainer.program.parameters

    def too_early(model: nn.Module, used: Sequence[nn.Module], besides: str | None) -> dict[int, list[str]]:
        last = len(used) - (ranks - rank)  # 1F1B ends with as many backward passes as ranks follow, and one
        names = [name for some in completed(model, used, besides).values() for name in some]
        return {number: names if number == last else [] for number in range(len(used))}

    def reduce_before_all_is_there() -> None:
        late = {name: p.grad for name, p in params.items() if p.grad is not None}
        reduce_grads()
        for name, grad in late.items():
            reduced = params[name].grad
            params[name].grad = grad if reduced is None else torch.add(reduced, grad)

    patch(pipeline, "completed", too_early)
    change(trainer, reduce_grads=reduce_before_all_is_there)


@fault(7, "PrimeIntellect-ai/prime-rl/pull/2562", "scale", "context", beside={"dp": {"degree": 3}})
def tokens_counted_on_every_rank_of_cp(trainer: Trainer) -> None:
    """Each rank of cp counts the valid targets of whole rows, and the counts are summed over all ranks."""
    change_loss(trainer, lambda loss, batch, valid: loss / (valid * trainer.config.mesh.cp.degree))


@fault(30, "ByteDance-Seed/VeOmni/pull/1115", "reduction", "context", beside=BESIDE)
def gradients_summed_over_dp_only(trainer: Trainer) -> None:
    """Ranks of cp hold the same parameters and keep the gradient of their own columns."""
    patch(ddp, "all_reduce", lambda tensor, axis: all_reduce(tensor, trainer.mesh.data))


@fault(30, "NVIDIA-NeMo/Automodel/pull/3135", "reduction", "tensor", beside=REPLICAS)
def replicas_forgotten_beside_tp(trainer: Trainer) -> None:
    """With a second axis in the mesh, the group of the replicas is lost: parts are summed within each replica."""
    patch(buckets, "all_reduce", lambda tensor, axis: at_once(axis, lambda: tensor))


@fault(26, "pytorch/pytorch/issues/144530", "reduction", "pipeline", options={"schedule": "zb_h1"}, beside=BESIDE)
def weights_part_unseen_by_ddp(trainer: Trainer) -> None:
    """The gradients that are computed apart from backward are there only when the reduction is over."""
    run, reduce_grads = WeightsLater.run, trainer.program.reduce_grads
    late: list[WeightsLater] = []

    def put_off_further(later: WeightsLater) -> None:
        late.append(later)

    def reduce_then_run() -> None:
        reduce_grads()
        while late:
            run(late.pop())

    patch(WeightsLater, "run", put_off_further)
    change(trainer, reduce_grads=reduce_then_run)


@fault(43, "deepspeedai/DeepSpeed/issues/7199", "data", "tensor")
def rows_cut_over_tp_too(trainer: Trainer) -> None:
    """The loader gives other rows to every rank, also to those that share a model."""
    shard, axis = trainer.program.shard_batch, trainer.mesh.axis("tp")
    change(trainer, shard_batch=lambda batch: shard(batch).split_rows(axis.size)[axis.rank])
