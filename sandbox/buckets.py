"""Gradients that travel together, and the one order in which they go.

Gradients become final from the last layer to the first. Buckets are filled in that order and each starts as soon as it
is full, while backward computes the rest. All ranks start buckets in the same order, whatever order their gradients
came in and even if some never came, or they would wait for each other for ever.

Most parameters are the same on all ranks that see other rows. Experts that are cut over ep are not: their gradients are
summed over fewer ranks, and have buckets of their own.

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sandbox.comm import Axis, Pending, all_reduce, reduce_scatter
from sandbox.mesh import Mesh
from sandbox.model import mixtures
from sandbox.partition import Partition, by_ranges
from sandbox.program import Program

__all__ = ["Bucket", "Over", "ScatterSum", "cut_buckets", "reduce_in_backward", "summed_over"]

Over = Callable[[str], Axis]
"""Name of a parameter -> the ranks over which its gradient is summed, or its state is cut."""


class Bucket:
    """Parameters whose gradients form one flat tensor [numel]: in this order, or as `partition` lays them out.

    A gradient is moved into the flat tensor as soon as it is there, while the cache still holds it, and what backward
    made is let go. Moved again, it is added. With `lasting` there is one flat tensor for good, which the next gradients
    overwrite: for new ones the kernel would clear pages anew in each step.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        partition: Partition | None = None,
        dtype: torch.dtype | None = None,
        *,
        lasting: bool = False,
    ) -> None:
        self.params, self.dtype, self.lasting = dict(params), dtype, lasting
        self._partition = partition or by_ranges(params, 1)
        self._flat: Tensor | None = None
        self._places: dict[str, list[Tensor]] = {}  # views of it: rows of each rank flat, ranges as the whole parameter
        self._filled: set[str] = set()

    @property
    def first(self) -> str:
        """The name of the first parameter."""
        return next(iter(self.params))

    @property
    def numel(self) -> int:
        """Elements of all gradients together."""
        return sum(p.numel() for p in self.params.values())

    def collect(self, name: str) -> None:
        """Move the gradient of `name` into the flat tensor."""
        param = self.params[name]
        if (grad := param.grad) is None:
            return
        flat, again = self._begin(), name in self._filled
        places = self._places[name]
        if not self._partition.rows:
            (places[0].add_ if again else places[0].copy_)(grad)
        elif again:
            torch._foreach_add_(places, torch.split_with_sizes(grad.reshape(-1), self._partition.lengths[name]))
        else:
            flat_grad = grad.reshape(-1).to(flat.dtype)
            torch.split_with_sizes_copy(flat_grad, self._partition.lengths[name], out=places)
        self._filled.add(name)
        param.grad = None

    def take(self) -> Tensor:
        """Hand out the flat tensor [numel]. What has no gradient has gradient zero, not none."""
        for name in self.params.keys() - self._filled:
            self.collect(name)  # what earlier passes left in a parameter that the last one did not use
        flat = self._begin()
        for name in self.params.keys() - self._filled:
            torch._foreach_zero_(self._places[name])
        self._filled.clear()
        if not self.lasting:
            self._flat, self._places = None, {}
        return flat

    def _begin(self) -> Tensor:
        if self._flat is None:
            first = self.params[self.first]
            self._flat = torch.empty(self.numel, dtype=self.dtype or first.dtype, device=first.device)
            self._places = self._partition.split(self._flat)
            if not self._partition.rows:
                self._places = {name: [piece.view_as(self.params[name])] for name, (piece,) in self._places.items()}
        return self._flat

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of `flat` [numel], in the parameter's shape and this bucket's order."""
        if flat is self._flat and not self._partition.rows:
            return {name: place for name, (place,) in self._places.items()}
        parts = torch.split_with_sizes(flat, [p.numel() for p in self.params.values()])
        return {name: part.view_as(p) for (name, p), part in zip(self.params.items(), parts, strict=True)}


def summed_over(model: nn.Module, mesh: Mesh, *axes: str) -> Over:
    """The ranks along `axes` that hold the same of a parameter: all, but for an expert those of one place in ep."""
    experts = {param for moe in mixtures(model) for param in moe.experts.parameters()}
    names = {name for name, param in model.named_parameters() if param in experts}
    most, few = mesh.axis(*axes), mesh.axis(*(axis for axis in axes if axis != "ep"))
    return lambda name: few if name in names else most


def cut_buckets(
    params: Mapping[str, nn.Parameter], megabytes: float, over: Over | None = None, *, lasting: bool = False
) -> list[Bucket]:
    """Cut the parameters, last first, into buckets of at least `megabytes` (MiB), but for the last.

    Parameters that are not summed over the same ranks share no bucket. `lasting`: for gradients that stay whole.
    """
    buckets: list[dict[str, nn.Parameter]] = []
    filling: dict[tuple[str, ...], dict[str, nn.Parameter]] = {}
    for name, param in reversed(list(params.items())):
        ranks = over(name).names if over else ()
        bucket = filling.setdefault(ranks, {})
        bucket[name] = param
        if sum(p.numel() * p.element_size() for p in bucket.values()) >= megabytes * 2**20:
            buckets.append(filling.pop(ranks))
    return [Bucket(bucket, lasting=lasting) for bucket in (*buckets, *filling.values())]


def reduce_in_backward(
    program: Program,
    buckets: list[Bucket],
    launch: Callable[[int, bool], None],
    finish: Callable[[bool], None],
    *,
    each: bool,
) -> Program:
    """Return `program` so that backward fills the buckets and calls `launch(number, final)` for each, in order.

    `finish(final)` follows when the backward pass is over. `final` tells the last microbatch of a step; without `each`,
    the passes before it are left alone, and their gradients add up locally.
    """
    home = {name: number for number, bucket in enumerate(buckets) for name in bucket.params}
    waiting: list[int] = []
    queue: deque[int] = deque()
    final = False

    def begin(last: bool) -> None:
        nonlocal final, waiting
        program.begin(last)
        final = last
        if final or each:
            waiting = [len(bucket.params) for bucket in buckets]
            queue.extend(range(len(buckets)))

    def grad_ready(name: str) -> None:
        program.grad_ready(name)
        if queue:
            buckets[home[name]].collect(name)
            waiting[home[name]] -= 1
        while queue and waiting[queue[0]] == 0:
            launch(queue.popleft(), final)

    def reduce_grads() -> None:
        program.reduce_grads()
        while queue:  # buckets with a parameter that this pass did not use
            launch(queue.popleft(), final)
        if final or each:
            finish(final)

    return replace(program, begin=begin, grad_ready=grad_ready, reduce_grads=reduce_grads)


class ScatterSum:
    """Sums flat gradients over `shards` (by bucket), keeps this rank's part, adds up those of earlier backward passes.

    After the last pass the sums are summed over `replicate` too: once a step, and on the part only. One reduction is
    under way while the next bucket fills, so whole gradients do not pile up.
    """

    def __init__(self, shards: Sequence[Axis], replicate: Axis, dtype: torch.dtype) -> None:
        self.sums: dict[int, Tensor] = {}
        self._shards, self._replicate, self._dtype = shards, replicate, dtype
        self._scatters: deque[tuple[int, bool, Pending]] = deque()
        self._replicas: list[Pending] = []

    def launch(self, number: int, flat: Tensor, sizes: list[int], final: bool) -> None:
        """Start to reduce bucket `number`; `flat` [sum(sizes)] holds all parts in rank order."""
        while self._scatters:
            self._land()
        self._scatters.append((number, final, reduce_scatter(flat, sizes, self._shards[number], self._dtype)))

    def finish(self) -> None:
        """Wait until `sums` holds everything that was launched."""
        while self._scatters:
            self._land()
        while self._replicas:
            self._replicas.pop().wait()

    def _land(self) -> None:
        number, final, scatter = self._scatters.popleft()
        part = scatter.wait()
        self.sums[number] = self.sums[number].add_(part) if number in self.sums else part
        if final and self._replicate.size > 1:
            self._replicas.append(all_reduce(self.sums[number], self._replicate))
