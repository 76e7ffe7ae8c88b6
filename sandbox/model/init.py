"""The model before it has any memory, and the first value of each parameter, by name.

A value depends on (seed, name) alone, so a rank makes what it holds without the rest, and every layout starts from
the same numbers. They come from NumPy: its float64 stream is the same on every processor, torch's is not.
"""

import numpy as np
import torch
from torch import Tensor

from sandbox.config import Model
from sandbox.model.transformer import Transformer

__all__ = ["build", "initial"]


def build(config: Model, dtype_name: str) -> Transformer:
    """The model on the meta device, to compute in `dtype_name`: float64, float32 or bfloat16."""
    with torch.device("meta"):
        return Transformer(config, getattr(torch, dtype_name))


def initial(name: str, shape: tuple[int, ...], config: Model, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """First value of the parameter with the logical `name` and `shape`, whole. Drawn in float64, whatever the `dtype`.

    `standard` is GPT-2's: the projections into the residual stream are scaled down by its 2 x layers summands.
    `rough` keeps signals of order one and every bias and norm away from 0 and 1.
    """
    noise = torch.from_numpy(np.random.default_rng([seed, *name.encode()]).standard_normal(shape))
    rough = config.init == "rough"
    if name.endswith("bias"):
        value = 0.3 * rough * noise
    elif len(shape) == 1:
        value = 1 + 0.3 * rough * noise
    elif rough:
        value = noise * shape[1] ** -0.5
    else:
        into_residual = name.endswith((".o.weight", ".down.weight"))
        value = 0.02 * noise * ((2 * config.layers) ** -0.5 if into_residual else 1)
    return value.to(dtype)
