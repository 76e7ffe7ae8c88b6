"""Dropout whose mask depends on a token's place in the global batch, and on nothing else.

Each decision is a hash of (step's key, row, column, site, feature): whoever holds a token finds the same mask for it,
under any sharding, and again when a checkpointed activation is recomputed. There is no generator to keep in step.

Source of the idea: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The hash is the finaliser
of SplitMix64: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

import torch
from torch import Tensor, nn

from sandbox.batch import Batch, once_per_batch

__all__ = ["Dropout", "kept"]

# Unsigned constants as the int64 with the same bits. Products wrap modulo 2**64, which is what the hash wants.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)


class Dropout(nn.Module):
    """Zero a fraction `rate` of the features, scale up the rest. `site` tells one place in the model from another."""

    def __init__(self, rate: float, site: int) -> None:
        super().__init__()
        self.rate, self.site = rate, site

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[B, S, D] -> [B, S, D]; `batch` holds the rows and columns that `x` holds."""
        if not self.training or not self.rate:
            return x
        return torch.where(kept(batch, self.site, x.shape[-1], self.rate), x * (1 / (1 - self.rate)), 0.0)


def kept(batch: Batch, site: int, width: int, rate: float) -> Tensor:
    """Which features live on: [B, S, width] bool, each true with probability 1 - `rate`."""
    token = _tokens(batch)
    pairs = torch.arange((width + 1) // 2, device=token.device) + (site << 32)
    bits = _mix(token + pairs.mul_(GOLDEN)).view(torch.int32)  # a hash of 64 bits decides two features
    return bits[..., :width] >= round(rate * 2**32) - 2**31


@once_per_batch
def _tokens(batch: Batch) -> Tensor:
    """A hash of each token's place, [B, S, 1]."""
    return _mix(_mix(batch.key + GOLDEN * ((batch.rows << 32)[:, None] + batch.columns)))[..., None]


def _mix(x: Tensor) -> Tensor:
    """Scramble int64: one to one, and every bit of the input moves every bit of the result."""
    x = (x ^ _shift(x, 30)).mul_(FIRST)
    x = x.bitwise_xor_(_shift(x, 27)).mul_(SECOND)
    return x.bitwise_xor_(_shift(x, 31))


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros: torch's own shift repeats the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
