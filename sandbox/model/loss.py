"""The training loss, as a sum: whoever knows the number of valid targets of the whole step divides by it."""

from torch import Tensor
from torch.nn import functional as F

from sandbox.batch import IGNORED
from sandbox.model.layers import wide

__all__ = ["loss_sum"]


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats, summed over valid targets: [B, S, V], [B, S] -> []. Exactly 0 if there is none."""
    scores = logits.flatten(0, 1).to(wide(logits.dtype))
    return F.cross_entropy(scores, targets.flatten(), ignore_index=IGNORED, reduction="sum")
