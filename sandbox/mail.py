"""What stages of a pipeline tell each other: hidden states on the way forward, their gradients on the way back.

A message is known by the action that it is for, so ranks may send and ask in any order. Sends never wait. What was sent
is kept until a message from the same rank shows that it must have arrived, for it was needed before.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sandbox.comm import Axis, Pending, receive, send
from sandbox.orders import Action
from sandbox.schedules import Schedule

__all__ = ["Mail"]


class Mail:
    """A rank's messages along the axis of a pipeline."""

    def __init__(self, axis: Axis, schedule: Schedule) -> None:
        self._axis, self._schedule = axis, schedule
        self._hidden: tuple[int, ...] = ()  # columns and features of a hidden state, by all that was folded later
        self._asked: dict[Action, Pending] = {}
        self._sent: dict[Action, Pending] = {}
        self._here: dict[Action, Tensor] = {}  # from a stage to the next on this very rank

    def open(self, rows: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """A step begins, of microbatches with so many rows."""
        self._rows, self._dtype, self._device = rows, dtype, device

    def hand(self, action: Action, tensor: Tensor) -> None:
        """Give `tensor` to whoever does `action`. It must be left alone from now on."""
        if not self._hidden:
            self._tell(tensor.shape[1:])
        home = self._schedule.homes[action.stage]
        if home == self._axis.rank:
            self._here[action] = tensor
        else:
            self._sent[action] = send(tensor.contiguous(), self._axis, home, self._tag(action))

    def ask(self, actions: Iterable[Action]) -> None:
        """Start to receive what the actions are for."""
        for action in actions:
            source = self._source(action)
            if source is None or action in self._asked:
                continue
            if not self._hidden and self._axis.rank == self._schedule.homes[0]:
                return  # whose first action is to make a hidden state
            landing = torch.empty(
                (self._rows[action.microbatch], *self._shape()), dtype=self._dtype, device=self._device
            )
            self._asked[action] = receive(landing, self._axis, source, self._tag(action))

    def take(self, action: Action) -> Tensor | None:
        """What `action` is for, when it is there; None where a stage begins or ends the model."""
        if action not in self._asked:
            return self._here.pop(action, None)
        tensor = self._asked.pop(action).wait()
        cause = next(need for need in self._schedule.needs(action) if need.stage != action.stage)
        for done in self._needed_until(cause):
            self._sent.pop(done).wait()
        return tensor

    def close(self) -> None:
        """The step is over: wait until all has arrived."""
        for action in list(self._sent):
            self._sent.pop(action).wait()

    def add_gradients(self, param: Tensor, holders: tuple[int, int]) -> None:
        """Sum the gradient of `param` over the two ranks that hold it; in float32 at least."""
        other = sum(holders) - self._axis.rank
        grad = torch.zeros_like(param, dtype=param.grad_dtype) if param.grad is None else param.grad
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        sending = send(wide, self._axis, other, 0)
        theirs = receive(torch.empty_like(wide), self._axis, other, 0).wait()
        sending.wait()
        param.grad = (wide + theirs).to(grad.dtype)

    def _needed_until(self, done: Action) -> list[Action]:
        """What was sent to the rank that has done `done`, for that or for what it does before."""
        homes, place = self._schedule.homes, self._schedule.places
        there = (action for action in self._sent if homes[action.stage] == homes[done.stage])
        return [action for action in there if place[action] <= place[done]]

    def _source(self, action: Action) -> int | None:
        """The rank that sends what `action` is for, if it is another one."""
        stage = action.stage + {"F": -1, "B": 1, "W": 0}[action.kind]
        if not 0 <= stage < self._schedule.stages or self._schedule.homes[stage] == self._axis.rank:
            return None
        return self._schedule.homes[stage]

    def _tag(self, action: Action) -> int:
        return 1 + 2 * (action.microbatch * self._schedule.stages + action.stage) + (action.kind == "B")

    def _tell(self, shape: Sequence[int]) -> None:
        """Once in a training, the rank that has the first hidden state tells all others its shape."""
        self._hidden = tuple(shape)
        for other in set(self._schedule.homes) - {self._axis.rank}:
            send(torch.tensor(self._hidden, device=self._device), self._axis, other, 0, "shape").wait()

    def _shape(self) -> tuple[int, ...]:
        if not self._hidden:
            landing = torch.empty(2, dtype=torch.int64, device=self._device)
            self._hidden = tuple(receive(landing, self._axis, self._schedule.homes[0], 0, "shape").wait().tolist())
        return self._hidden
