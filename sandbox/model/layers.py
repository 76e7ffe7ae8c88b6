"""Layers that compute in the dtype of their input, whatever the dtype of their parameters.

A weight is cast on use, so its gradient arrives in the parameter's own dtype: float32 parameters under bfloat16
compute accumulate in float32. Where the dtypes agree the cast is free.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sandbox.config import Model

__all__ = ["MLP", "Embedding", "LayerNorm", "Linear", "Linears", "RMSNorm", "each", "norm", "wide"]

Linears = Callable[..., tuple[Tensor, ...]]
"""`linears(x, *layers)`: the output of each of `layers` for the same `x`."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over many elements: `dtype`, but at least float32."""
    return torch.promote_types(dtype, torch.float32)


class Unset(nn.Module):
    """A layer without first values of its own: init.py gives them, by name. To draw them too was half of a build."""

    def reset_parameters(self) -> None:
        """Leave parameters as they are."""


class Embedding(Unset, nn.Embedding):
    """A row of the table for each token: [B, S] -> [B, S, D]."""


class Linear(Unset, nn.Linear):
    """`x W^T + b`: [..., I] -> [..., O]."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(Unset, nn.RMSNorm):
    """Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        dtype = wide(x.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)


class LayerNorm(Unset, nn.LayerNorm):
    """Ba et al., "Layer Normalization", 2016."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        dtype = wide(x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), bias, self.eps).to(x.dtype)


def norm(config: Model, width: int, dtype: torch.dtype) -> nn.Module:
    """The norm over the last `width` features that `config` asks for."""
    if config.norm == "rms":
        return RMSNorm(width, eps=1e-6, dtype=dtype)
    return LayerNorm(width, eps=1e-5, bias=config.bias, dtype=dtype)


def each(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """All of `layers` of the same input."""
    return tuple(layer(x) for layer in layers)


class MLP(nn.Module):
    """Two linears around a GELU, or three around a gate: Shazeer, "GLU Variants Improve Transformer", 2020.

    `linears` computes those that share the input; tensor parallelism replaces it.
    """

    def __init__(self, config: Model, dtype: torch.dtype) -> None:
        super().__init__()
        width, hidden, bias = config.width, config.mlp_hidden, config.bias
        self.gate = Linear(width, hidden, bias, dtype=dtype) if config.mlp == "swiglu" else None
        self.up = Linear(width, hidden, bias, dtype=dtype)
        self.down = Linear(hidden, width, bias, dtype=dtype)
        self.linears: Linears = each

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if self.gate is None:
            (up,) = self.linears(x, self.up)
            hidden = F.gelu(up)
        else:
            gate, up = self.linears(x, self.gate, self.up)
            hidden = F.silu(gate) * up
        out: Tensor = self.down(hidden)
        return out
