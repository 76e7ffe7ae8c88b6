"""Bugs of experts and of their parallelism: in routing, in what is sent, and in who sums what."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sandbox.program
from sandbox.comm import Axis, Pending, all_reduce
from sandbox.config import Data
from sandbox.model import mixtures, routing_losses
from sandbox.program import Program, make_optimizer
from sandbox.strategies import ddp, expert
from sandbox.trainer import Trainer
from sandbox.verify.cases import EXPERTS
from sandbox.verify.faults.planting import change, fault, patch

FOUR = EXPERTS.model_copy(update={"experts": 4})
MANY = EXPERTS.model_copy(update={"experts": 16})
TWO_OF_EACH = {"dp": {"degree": 4, "strategy": "ddp"}}


@fault(8, "NVIDIA/Megatron-LM/pull/5956", "reduction", "expert", beside=TWO_OF_EACH)
def expert_gradients_scaled_by_ep(trainer: Trainer) -> None:
    """Gradients of experts are averaged over the ranks that hold an expert, as if only those had sent it tokens."""
    begin, reduce_grads, ranks = trainer.program.begin, trainer.program.reduce_grads, trainer.config.mesh.ep.degree
    last = False

    def remember(final: bool) -> None:
        nonlocal last
        begin(final)
        last = final

    def scale() -> None:
        reduce_grads()
        for param in dict(_experts(trainer)).values() if last else ():
            assert param.grad is not None
            param.grad *= ranks

    change(trainer, begin=remember, reduce_grads=scale)


@fault(9, "NVIDIA-NeMo/Automodel/issues/1408", "backward", "expert")
def routing_loss_without_gradient(trainer: Trainer) -> None:
    """The routers' losses are added to what is reported, and their gradient never flows."""
    patch(sandbox.program, "routing_losses", lambda model: [loss.detach() for loss in routing_losses(model)])


@fault(9, "NVIDIA/Megatron-LM/pull/3769", "backward", "expert", 3)
def routing_loss_averaged_over_ranks(trainer: Trainer) -> None:
    """Gradients of the routers' losses are divided by the number of data ranks, and summed over them."""
    ranks = trainer.mesh.data.size

    def divided(model: nn.Module) -> list[Tensor]:
        return [loss / ranks + (loss - loss / ranks).detach() for loss in routing_losses(model)]

    patch(sandbox.program, "routing_losses", divided)


@fault(9, "NVIDIA/Megatron-LM/pull/5047", "reduction", "expert", beside={"cp": {"degree": 2}})
def choices_counted_in_own_columns(trainer: Trainer) -> None:
    """Each rank of cp counts how a row's tokens chose among its own columns."""
    for moe in mixtures(trainer.program.model):
        moe.across = lambda counts: counts


@fault(14, "pytorch/torchtitan/pull/2416", "reduction", "expert", beside={"tp": {"degree": 2}})
def gate_gradients_not_summed(trainer: Trainer) -> None:
    """Each rank of tp keeps the gradient of the gate weights that its own features give."""
    for moe in mixtures(trainer.program.model):
        moe.weigh = lambda weights: weights


@fault(14, "NVIDIA-NeMo/Automodel/pull/2995", "backward", "expert")
def router_detached(trainer: Trainer) -> None:
    """Gate weights are gathered by a collective that autograd does not see: of the loss, the router has no gradient."""
    for moe in mixtures(trainer.program.model):
        moe.weigh = Tensor.detach


@fault(22, "NVIDIA/Megatron-LM/pull/5916", "reduction", "expert", model=FOUR, beside=TWO_OF_EACH)
def experts_summed_over_all_data_ranks(trainer: Trainer) -> None:
    """Gradients of experts are summed over all data ranks, which hold others, instead of those that hold the same."""
    few, most = trainer.mesh.axis("dp_shard"), trainer.mesh.data

    def wrong_group(tensor: Tensor, axis: Axis) -> Pending:
        return all_reduce(tensor, most if axis is few else axis)

    patch(ddp, "all_reduce", wrong_group)


@fault(35, "deepspeedai/DeepSpeed/issues/8475", "norm", "expert", 4)
def experts_counted_on_one_rank(trainer: Trainer) -> None:
    """Experts are taken for replicas, so only those of the first rank of ep count in the norm."""
    clip, copy = trainer.program.clip, trainer.mesh.axis("ep").rank
    layout = dict(trainer.program.layout)
    layout |= {name: replace(layout[name], copy=copy) for name, _ in _experts(trainer)}

    def undercount(program: Program, most: float | None) -> Tensor:
        return clip(replace(program, layout=layout), most)

    change(trainer, clip=undercount)


@fault(
    42, "NVIDIA-NeMo/Automodel/pull/2995", "optimizer", "expert", model=MANY, data=Data(sequence=3),
    train={"batch": 12}, beside=TWO_OF_EACH,
)  # fmt: skip
def expert_without_tokens_not_stepped(trainer: Trainer) -> None:
    """Where no token came to an expert its gradient is None: there it does not step, elsewhere it does."""
    trainer.optimizer = make_optimizer(trainer.program, fused=False)  # torch's fused SGD fails if some have no momentum
    step = trainer.optimizer.step
    experts = [one for moe in mixtures(trainer.program.model) for one in moe.experts.values()]
    idle = set(experts)

    def skip(*args: Any) -> Any:
        for param in (param for one in idle for param in one.parameters()):
            param.grad = None
        idle.update(experts)
        return step(*args)

    for one in experts:
        one.register_forward_pre_hook(lambda module, args: idle.discard(module) if len(args[0]) else None)
    patch(trainer.optimizer, "step", skip)


@fault(67, "tjake/Jlama/pull/201", "forward", "expert")
def results_not_weighted(trainer: Trainer) -> None:
    """What a token's experts say is summed without the gate weights."""
    for moe in mixtures(trainer.program.model):
        moe.weigh = torch.ones_like


@fault(68, "vllm-project/vllm/pull/52639", "forward", "expert", 3)
def results_returned_in_the_owners_order(trainer: Trainer) -> None:
    """Results go back as the owner sorted them by expert, not as they came."""
    patch(expert, "inverse", lambda order: torch.arange(len(order)))


@fault(69, "deepspeedai/DeepSpeed/pull/1492", "forward", "expert")
def tokens_beyond_capacity_dropped(trainer: Trainer) -> None:
    """Each expert takes its even share of a rank's tokens and drops the rest."""

    def capped(compute: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, counts: Tensor) -> Tensor:
        place = torch.arange(len(tokens)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return compute(tokens, counts) * (place < len(tokens) // len(counts))[:, None]

    for moe in mixtures(trainer.program.model):
        moe.compute = partial(capped, moe.compute)


def _experts(trainer: Trainer) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, param) for name, param in trainer.program.parameters.items() if ".experts." in name)
