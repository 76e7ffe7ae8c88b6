"""The transformer: embedding, blocks, norm, head. Pre-norm, as in Radford et al., "GPT-2", 2019, and LLaMA, 2023."""

import torch
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.config import Model
from sandbox.model.attention import Attention
from sandbox.model.dropout import Dropout
from sandbox.model.layers import MLP, Embedding, Linear, norm
from sandbox.model.moe import MoE

__all__ = ["Block", "Transformer"]


class Block(nn.Module):
    """Attention and MLP, or a mixture of several, each added to the residual stream."""

    mlp: MLP | MoE

    def __init__(self, config: Model, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = norm(config, config.width, dtype)
        self.attention = Attention(config, dtype)
        self.dropout1 = Dropout(config.dropout, site=2 * index + 1)
        self.norm2 = norm(config, config.width, dtype)
        self.mlp = MoE(config, dtype) if config.has_experts(index) else MLP(config, dtype)
        self.dropout2 = Dropout(config.dropout, site=2 * index + 2)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x = x + self.dropout1(self.attention(self.norm1(x), batch), batch)
        hidden = self.norm2(x)
        hidden = self.mlp(hidden, batch) if isinstance(self.mlp, MoE) else self.mlp(hidden)
        out: Tensor = x + self.dropout2(hidden, batch)
        return out


class Transformer(nn.Module):
    """Tokens to logits, computed in `dtype`. Parameters are float32, or float64 if `dtype` is.

    A stage of a pipeline sets the parts it lacks to None and drops blocks. Their keys, and so all names, stay.
    """

    embed: nn.Embedding | None
    norm: nn.Module | None
    head: Linear | None

    def __init__(self, config: Model, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        own = torch.float64 if dtype == torch.float64 else torch.float32
        self.dtype = dtype
        self.embed = Embedding(config.padded_vocab, config.width, dtype=own)
        self.dropout = Dropout(config.dropout, site=0)
        self.blocks = nn.ModuleDict({str(index): Block(config, index, own) for index in range(config.layers)})
        self.norm = norm(config, config.width, own)
        self.head = Linear(config.width, config.padded_vocab, bias=False, dtype=own)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of `batch`; from the `hidden` state [B, S, D] if `embed` is None, to it if `head` is."""
        if self.embed is not None:
            hidden = self.dropout(self.embed(batch.tokens).to(self.dtype), batch)
        assert hidden is not None, "without an embedding, a hidden state must be handed in"
        x = hidden
        for block in self.blocks.values():
            x = block(x, batch)
        if self.norm is not None:
            x = self.norm(x)
        if self.head is not None:
            x = self.head(x)
        return x
