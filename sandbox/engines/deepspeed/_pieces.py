"""What DeepSpeed's optimizer keeps, told by the program's parameters.

DeepSpeed steps on flat tensors in float32, some parameters end to end, and its state belongs to those. The program's
parameters are views of them, so what is kept for one of them is the same view of what is kept for the flat tensor.
"""

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sandbox.engines.deepspeed import _cpu_adam
from sandbox.errors import CheckpointError

__all__ = ["ByPiece", "Kept", "bring_up_to_date", "flat_tensors"]

FLAT = {
    "DeepSpeedZeroOptimizer": "single_partition_of_fp32_groups",
    "BF16_Optimizer": "fp32_groups_flat_partition",
    "DeepSpeedZeroOptimizer_Stage3": "fp32_partitioned_groups_flat",
}
"""Its optimizers, and where each has its flat tensors."""


class ByPiece:
    """The optimizer `inner` as if each of `pieces` were a parameter of its own: its group, and its state.

    Raises CheckpointError: a piece is no view of a flat tensor, so what is kept for it could not be found.
    """

    def __init__(self, inner: torch.optim.Optimizer, flats: Sequence[Tensor], pieces: Iterable[Tensor]) -> None:
        self.state = {piece: _kept(inner, piece, flats) for piece in pieces if piece.numel()}
        self.param_groups = [{"params": list(self.state), "fused": inner.param_groups[0].get("fused")}]


class Kept(MutableMapping[str, Tensor]):
    """What is kept for the elements from `start` on of a flat tensor, by field: views, and the whole one's numbers.

    With `counts` numbers are kept as int, as DeepSpeed's own optimizer does, and told as torch's would be.
    """

    def __init__(self, state: MutableMapping[str, Any], flat: Tensor, start: int, numel: int, counts: bool) -> None:
        self.state, self.flat, self.start, self.numel, self.counts = state, flat, start, numel, counts

    def __getitem__(self, field: str) -> Tensor:
        value = self.state[field]
        if self.counts and not isinstance(value, Tensor):
            return torch.tensor(float(value))
        value = torch.as_tensor(value)
        return value.narrow(0, self.start, self.numel) if value.dim() else value

    def __setitem__(self, field: str, value: Tensor) -> None:
        if not value.dim():
            self.state[field] = int(value) if self.counts else value
            return
        if self.state.get(field) is None:
            self.state[field] = torch.zeros_like(self.flat)  # all of it, as the first step would
        self[field].copy_(value)

    def __delitem__(self, field: str) -> None:
        del self.state[field]

    def __iter__(self) -> Iterator[str]:
        return (field for field, value in self.state.items() if value is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def flat_tensors(engine: Any) -> list[Tensor]:
    """What the engine's optimizer steps on, on this rank; nothing without ZeRO, where that is the parameters."""
    return list(getattr(engine.optimizer, FLAT.get(type(engine.optimizer).__name__, ""), ()))


def bring_up_to_date(engine: Any, inner: torch.optim.Optimizer) -> None:
    """Give the model the values of the flat tensors, as a step does at its end, and `inner` the number of steps."""
    if _cpu_adam.is_own(inner):
        _cpu_adam.catch_up(inner)
    own = engine.optimizer
    if type(own).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        for number in range(len(flat_tensors(engine))):
            own._reassign_or_swap_out_partitioned_parameters(number)
    elif flat_tensors(engine):
        own.update_lp_params()


def _kept(inner: torch.optim.Optimizer, piece: Tensor, flats: Sequence[Tensor]) -> Kept:
    for flat in flats:
        start = (piece.data_ptr() - flat.data_ptr()) // flat.element_size()
        if 0 <= start <= flat.numel() - piece.numel():
            counts = _cpu_adam.is_own(inner)
            return Kept(inner.state[flat], flat.detach(), start, piece.numel(), counts)
    raise CheckpointError("engine deepspeed: its optimizer's state is out of reach. Set run.checkpoint_every: 0.")
