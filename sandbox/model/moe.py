"""A mixture of experts in the place of an MLP: a router sends each token to `top_k` of E experts, and drops none.

For a token x, with gates p = softmax(R x) over all experts and K the `top_k` largest of them,

    y = sum over i in K of  w_i expert_i(x)        w = p, divided by its sum over K if `renormalise`

Two losses keep the router in order. Both are sums over VALID tokens (those with a target), which whoever trains
divides, together with the loss proper, by the valid targets of the whole step. So they are means over all valid tokens:

    balance    aux_loss E sum_i f_i p_i(t)         for each token t
    z          z_loss (log sum_i exp (R x_t)_i)^2

f_i is the fraction of pairs (token, choice) that went to expert i, among the valid tokens of t's own ROW; no gradient
flows through it. Summed over a row, the first is DeepSeek-V3's sequence-wise loss, E sum_i f_i mean_t p_i(t), weighted
by the row's valid tokens: 1 if all is even, E / top_k at worst. Nothing in it reaches beyond a row, so it is the same
however rows are cut over ranks and microbatches; whoever cuts a row must only add up the counts behind f: `across`.

Tokens are sorted by expert, and each expert computes its consecutive ones. An expert without a token computes none all
the same, so that its gradient is zero and not absent.

Sources: Shazeer et al., "Outrageously Large Neural Networks", 2017; Fedus et al., "Switch Transformers", JMLR 2022 (f
and p); Zoph et al., "ST-MoE", 2022 (z); Gale et al., "MegaBlocks", MLSys 2023 (dropless); DeepSeek-AI, "DeepSeek-V3
Technical Report", 2024, 2.1.2 (by sequence).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sandbox.batch import IGNORED, Batch
from sandbox.config import Model
from sandbox.model.layers import MLP, Linear, wide

__all__ = ["Compute", "Experts", "MoE", "inverse", "mixtures", "routing_losses"]

Compute = Callable[[Tensor, Tensor], Tensor]
"""`compute(tokens, counts)`: [N, D], sorted by expert, and how many each has, [E] int64 -> what experts say, [N, D]."""


class Experts(nn.ModuleDict):
    """MLPs by number. A rank may hold some of them only; keys, and so names, stay."""

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """[N, D], sorted by expert, `counts` for each -> [N, D]."""
        parts = tokens.split(counts.tolist())
        return torch.cat([expert(part) for expert, part in zip(self.values(), parts, strict=True)])


class MoE(nn.Module):
    """Router and experts. What parallelism has to replace is a slot of its own, and does nothing here:

    `enter` hands the hidden state to router and experts, `weigh` the gate weights to where they are used, `compute` the
    sorted tokens to the experts, `leave` the result to the residual stream; `across` adds up what a row counts.
    """

    def __init__(self, config: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.top_k, self.renormalise = config.top_k, config.renormalise
        self.aux_loss, self.z_loss = config.aux_loss, config.z_loss
        self.router = Linear(config.width, config.experts, bias=False, dtype=dtype)
        self.experts = Experts({str(number): MLP(config, dtype) for number in range(config.experts)})
        self.enter: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda x: (x, x)
        self.weigh: Callable[[Tensor], Tensor] = lambda weights: weights
        self.compute: Compute = partial(nn.Module.__call__, self.experts)  # plainly assigned, it would be a second name
        self.leave: Callable[[Tensor], Tensor] = lambda x: x
        self.across: Callable[[Tensor], Tensor] = lambda counts: counts
        self.loss: Tensor | None = None  # of the last forward in training, until `routing_losses` takes it

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        seen, x = self.enter(x)
        weights, chosen = self.route(seen, batch)
        out = self.combine(x, self.weigh(weights), chosen.flatten())
        return self.leave(out)

    def route(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B, S, D] -> gate weights and numbers of each token's experts, [B, S, K] each. In float32 at least."""
        logits = self.router(x.to(wide(x.dtype)))
        gates = logits.softmax(-1)
        weights, chosen = gates.topk(self.top_k)
        # outside training none, not even one left by a block that backward computed again
        self.loss = self._loss(logits, gates, chosen, batch.targets != IGNORED) if self.training else None
        return weights / weights.sum(-1, keepdim=True) if self.renormalise else weights, chosen

    def combine(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """What the experts `chosen` [B S K] say of x [B, S, D], weighted by [B, S, K]."""
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=self.router.out_features)
        sorted_ = self.compute(x.flatten(0, 1)[order // self.top_k], counts)
        said = sorted_[inverse(order)].view(*weights.shape, -1)
        return (said * weights.to(x.dtype)[..., None]).sum(2)

    def _loss(self, logits: Tensor, gates: Tensor, chosen: Tensor, valid: Tensor) -> Tensor:
        """Both losses, summed over valid tokens: [B, S, E], [B, S, E], [B, S, K], [B, S] -> []."""
        mask, number = valid[..., None].to(gates.dtype), gates.shape[-1]
        counts = self.across((F.one_hot(chosen, number).sum(2) * mask).sum(1))  # [B, E], of whole rows
        shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        balance = number * ((gates * mask).sum(1) * shares).sum()
        z = (logits.logsumexp(-1).square() * mask[..., 0]).sum()
        return self.aux_loss * balance + self.z_loss * z


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, [N] -> [N]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def mixtures(model: nn.Module) -> Iterator[MoE]:
    """All mixtures of a model, in forward order."""
    return (module for module in model.modules() if isinstance(module, MoE))


def routing_losses(model: nn.Module) -> list[Tensor]:
    """Take the losses of all routers in the last forward: each a sum over valid tokens. Empty outside training."""
    found = [(moe, moe.loss) for moe in mixtures(model)]
    for moe, _ in found:
        moe.loss = None
    return [loss for _, loss in found if loss is not None]
