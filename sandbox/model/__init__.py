"""A decoder transformer in plain torch. It knows nothing of parallelism: strategies act on it from outside."""

from sandbox.model.attention import Attention, attend, triangular, visible
from sandbox.model.init import build, initial
from sandbox.model.loss import loss_sum
from sandbox.model.moe import Experts, MoE, mixtures, routing_losses
from sandbox.model.transformer import Block, Transformer

__all__ = [
    "Attention",
    "Block",
    "Experts",
    "MoE",
    "Transformer",
    "attend",
    "build",
    "initial",
    "loss_sum",
    "mixtures",
    "routing_losses",
    "triangular",
    "visible",
]
