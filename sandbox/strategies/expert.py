"""Expert parallelism: every rank holds some experts of every mixture, and tokens travel to those who hold theirs.

    tensor               before          in use                        gradient is summed over
    expert's W           W[F, D]_ep      on what came from all of ep   dp / ep x cp
    router's, all other  W[F, D]         -                             dp x cp
    hidden state         X[B_dp, S, D]   pairs: T[N, D] -> T[N', D]    -

`_ep` reads: whole experts are dealt out over ep; numbers differ by one at most. ep is carved out of the data ranks,
dp = dp_replicate x dp_shard x ep, all of which see other rows, so `mesh.ep.degree` divides `mesh.dp.degree / replicas`.
An expert's gradient lacks only the rows of other groups of ep, for the tokens of its own group came to it. All other
parameters are replicated over ep like over the rest of dp. Where a data strategy sums, it cuts over the same ranks.
The loss is a sum over valid tokens, never a mean over a group, so no gradient is to be scaled.

A pair is a token and one of its experts: N = tokens x top_k, sorted by expert and so by owner. In each mixture ranks
tell each other how many pairs come, for each expert; then

    forward     all_to_all tokens of pairs [N, D]       compute     all_to_all results [N', D] back
    backward    all_to_all gradients of results         compute     all_to_all gradients of tokens back

Bytes sent by a rank in one mixture and microbatch, if s of its N pairs are for others and r pairs of others for it:
2 (s + r) D. That is up to the router, but a token's experts differ, so each of a rank's own tokens has at least
top_k - E_own and at most min(top_k, E - E_own) pairs for others, and each token of others at least top_k - (E - E_own)
and at most min(top_k, E_own) pairs for it: exact if every token goes to all experts. Over the ranks of a group sum s is
sum r. The counts, E - E_own of them in int64, travel as `sizes`. Nothing is dropped, padded or capped. What is computed
again (`train.recompute: full`) travels again: 3 (s + r) D, and `sizes` twice.
Memory: 1/n of the experts' parameters, gradients and optimizer state (n ranks of ep).

Sources: Lepikhin et al., "GShard", ICLR 2021; Rajbhandari et al., "DeepSpeed-MoE", ICML 2022; Singh et al., "A Hybrid
Tensor-Expert-Data Parallelism Approach to Optimize Mixture-of-Experts Training", ICS 2023.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sandbox.comm import Axis, all_to_all
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.errors import ConfigError
from sandbox.mesh import Mesh
from sandbox.model import Experts, mixtures
from sandbox.model.moe import inverse
from sandbox.partition import even
from sandbox.predict import Prediction
from sandbox.program import Program
from sandbox.strategies import context

AXIS = "ep"


class Options(Base):
    """Options of `expert`: none."""


def check(config: Config, options: Options) -> None:
    """Every rank needs an expert."""
    degree, experts = config.mesh.ep.degree, config.model.experts
    if degree > experts:
        ranks = config.mesh.dp.degree // config.mesh.dp.replicas
        fewer = next(n for n in range(max(1, experts), 0, -1) if ranks % n == 0)
        raise ConfigError(
            f"mesh.ep.degree {degree} is more than model.experts {experts}. "
            f"Set model.experts: {degree}, or mesh.ep.degree: {fewer}."
        )


def dealt(config: Config) -> list[list[int]]:
    """The experts of each rank; how many they are differs by one at most."""
    number = config.model.experts
    return [part.tolist() for part in torch.arange(number).split(even(number, config.mesh.ep.degree))]


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with its experts dealt out over ep, and tokens sent to their owners."""
    axis, held = mesh.axis(AXIS), even(program.config.model.experts, mesh.axis(AXIS).size)
    for moe in mixtures(program.model):
        keep(moe.experts, held, axis.rank)
        moe.compute = partial(visit, moe.experts, held, axis)
    parameters = dict(program.model.named_parameters())
    mine = {p for moe in mixtures(program.model) for p in moe.experts.parameters()}
    layout = {name: program.layout[name] for name in parameters}
    for name, param in parameters.items():
        if param in mine:
            layout[name] = replace(layout[name], sharded=(*layout[name].sharded, *axis.names))
    return replace(program, parameters=parameters, layout=layout)


def keep(experts: Experts, held: Sequence[int], rank: int) -> None:
    """Drop the experts that are not this rank's."""
    start = sum(held[:rank])
    for number in list(experts):
        if not start <= int(number) < start + held[rank]:
            del experts[number]


def visit(experts: Experts, held: Sequence[int], axis: Axis, tokens: Tensor, counts: Tensor) -> Tensor:
    """Have the owners compute `tokens` [N, D], sorted by expert, `counts` [E] for each -> their results [N, D]."""
    own = held[axis.rank]
    arriving = all_to_all(counts, held, counts.new_empty(axis.size * own), [own] * axis.size, axis, "sizes").wait()
    sent = [int(part.sum()) for part in counts.split(list(held))]
    came = arriving.view(axis.size, own).sum(1).tolist()
    arrived = travel(tokens, sent, came, axis)  # sorted by sender, then by expert
    order = torch.arange(own).repeat(axis.size).repeat_interleave(arriving.cpu()).argsort(stable=True).to(tokens.device)
    results = experts(arrived[order], arriving.view(axis.size, own).sum(0))
    return travel(results[inverse(order)], came, sent, axis)


def travel(rows: Tensor, sent: Sequence[int], came: Sequence[int], axis: Axis) -> Tensor:
    """Send each rank its `sent` of the rows [N, D], in rank order -> those that came [N', D], in rank order."""
    out: Tensor = Travel.apply(rows, sent, came, axis)  # type: ignore[no-untyped-call]
    return out


class Travel(torch.autograd.Function):
    """`travel`, and its way back: gradients go to where the rows came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: Sequence[int], came: Sequence[int], axis: Axis) -> Tensor:
        """[N, D] -> [N', D]."""
        ctx.way = sent, came, axis
        return _move(rows, sent, came, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """[N', D] -> [N, D]."""
        sent, came, axis = ctx.way
        return _move(grad, came, sent, axis), None, None, None


def _move(rows: Tensor, sent: Sequence[int], came: Sequence[int], axis: Axis) -> Tensor:
    width = rows.shape[1]
    landing = rows.new_empty(sum(came), width)
    sizes, landing_sizes = ([count * width for count in counts] for counts in (sent, came))
    all_to_all(rows.contiguous().view(-1), sizes, landing.view(-1), landing_sizes, axis).wait()
    return landing


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes that this rank sends in one step: at most, and at least. Cuts `model` down to its experts."""
    axis, number, top_k = mesh.axis(AXIS), config.model.experts, config.model.top_k
    held, layers = even(number, axis.size), len(list(mixtures(model)))
    own = held[axis.rank]
    for moe in mixtures(model):
        keep(moe.experts, held, axis.rank)
    columns, forward = context.held(mesh, config), 2 if config.train.recompute == "full" else 1
    first = mesh.data.rank - axis.rank
    tokens = [rows * columns for rows in even(config.train.batch, mesh.data.size)[first : first + axis.size]]
    mine, others = tokens[axis.rank], sum(tokens) - tokens[axis.rank]
    least = mine * max(0, top_k - own) + others * max(0, top_k - (number - own))
    most = mine * min(top_k, number - own) + others * min(top_k, own)
    pair = (1 + forward) * layers * config.model.width * getattr(torch, config.train.dtype).itemsize
    sizes = forward * layers * config.train.microbatches * (number - own) * torch.int64.itemsize
    key = f"all_to_all {axis.name}"
    return Prediction({key: most * pair, f"sizes {axis.name}": sizes}, least={key: least * pair})
