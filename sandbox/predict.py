"""What a strategy says of itself before it runs: bytes sent and bytes held, by rank."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sandbox.config import Train

__all__ = ["Prediction", "bytes_of", "state_copies"]


@dataclass(frozen=True)
class Prediction:
    """Bytes that one rank sends in a step, by collective and axis, and holds after it, by kind of tensor.

    What depends on the data, as where a router sends tokens does, is at most `traffic` and at least `least`.
    """

    traffic: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, float] = field(default_factory=dict)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all `tensors` together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def state_copies(train: Train) -> int:
    """Tensors of a parameter's size that the optimizer keeps for it (K in the ZeRO paper, in units of a parameter)."""
    return {"sgd": 0, "sgd_momentum": 1, "adamw": 2}[train.optimizer]
