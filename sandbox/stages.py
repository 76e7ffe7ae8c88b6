"""A transformer in stages: where it is cut, what a rank keeps, a stage as a model, and weights' gradients put off.

A stage is the names of its parts: `embed`, keys of blocks, `head` (the final norm and the head). A rank's model is one
transformer with the parts of all its stages, so names, hooks and buckets are those of any model, and a stage is a view
of it: the same modules, some of them left out.
"""

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sandbox.comm import Axis
from sandbox.config import Config, Options
from sandbox.errors import ConfigError
from sandbox.model import Transformer
from sandbox.orders import LOOPED, VS
from sandbox.program import Program

__all__ = [
    "Stage",
    "StageOptions",
    "WeightsLater",
    "check_stages",
    "completed",
    "cut",
    "keep",
    "on_rank",
    "shared_weight",
    "view",
]

Stage: TypeAlias = tuple[str, ...]


class StageOptions(Options):
    """Options of a pipeline, whoever runs it; each engine narrows `schedule` to those that it has."""

    schedule: str = Field("1f1b", description="which rank does what when")
    stages: int | None = Field(None, ge=1, description="stages on each rank; default: 2 if there can be several")
    cut: Literal["layers", "parameters"] = Field(
        "layers", description="stages of as many layers, embedding and head being one each; or of as many parameters"
    )
    looped: ClassVar[tuple[str, ...]] = LOOPED  # schedules with any number of stages a rank

    @property
    def each(self) -> int:
        """Stages on each rank."""
        if self.schedule in self.looped:
            return self.stages or 2
        return 2 if self.schedule in VS else 1


def check_stages(config: Config, options: StageOptions) -> None:
    """Raise ConfigError where a schedule has another number of stages a rank, or there are fewer parts than stages."""
    name, each, degree, layers = options.schedule, options.each, config.mesh.pp.degree, config.model.layers
    if options.stages not in (None, each):
        enough = degree * options.stages <= layers + 2
        raise ConfigError(
            f"mesh.pp.stages {options.stages}: schedule {name} has {each} on each rank. "
            f"Set mesh.pp.stages: {each}{', or mesh.pp.schedule: ' + ' or '.join(options.looped) if enough else ''}."
        )
    if degree * each > layers + 2:
        ranks, stages = (layers + 2) // each, (layers + 2) // degree
        fewer = f", or mesh.pp.degree: {ranks}" if ranks > 1 else ""
        fewer += f", or mesh.pp.stages: {stages}" if stages and name in options.looped else ""
        raise ConfigError(
            f"mesh.pp.degree {degree} with {each} stage{'s' if each > 1 else ''} on each rank needs {degree * each} "
            f"parts, but embedding, {layers} layers and head are {layers + 2}. "
            f"Set model.layers: {degree * each - 2}{fewer}."
        )


def cut(model: Transformer, stages: int, by: str) -> list[Stage]:
    """Consecutive parts for each stage, at least one. `by`: each counts 1 ("layers"), or its size ("parameters")."""
    parts: dict[str, list[nn.Module | None]] = {
        "embed": [model.embed],
        **{key: [block] for key, block in model.blocks.items()},
        "head": [model.norm, model.head],
    }
    sizes = {
        name: sum(p.numel() for module in modules if module is not None for p in module.parameters())
        for name, modules in parts.items()
    }
    weights = [1 if by == "layers" else size for size in sizes.values()]
    ends = _balanced(weights, stages)
    return [tuple(parts)[start:end] for start, end in zip((0, *ends), ends, strict=False)]


def shared_weight(model: Transformer) -> str | None:
    """The name of the parameter that embedding and head share, if they do."""
    tied = model.embed is not None and model.head is not None and model.head.weight is model.embed.weight
    return "embed.weight" if tied else None


def keep(model: Transformer, stages: Sequence[Stage]) -> None:
    """Drop every part that is in none of `stages`. A head tied to an embedding elsewhere keeps it, for its name."""
    names = {name for stage in stages for name in stage}
    tied = shared_weight(model) is not None
    model.blocks = nn.ModuleDict({key: block for key, block in model.blocks.items() if key in names})
    if "embed" not in names and not (tied and "head" in names):
        model.embed = None
    if "head" not in names:
        model.norm = model.head = None


def on_rank(program: Program, axis: Axis, stages: Sequence[Stage], copied: str | None) -> Program:
    """Return `program` with a rank's stages only. `copied`: the weight, if any, that counts on another rank already."""
    assert isinstance(program.model, Transformer)
    keep(program.model, stages)
    names = [name for name, _ in program.model.named_parameters()]
    boxes = {name: program.layout[name] for name in names}
    return replace(
        program,
        parameters={name: program.parameters[name] for name in names},
        layout={
            name: replace(box, sharded=(*box.sharded, *axis.names), copy=int(name == copied))
            for name, box in boxes.items()
        },
    )


def view(model: Transformer, stage: Stage) -> Transformer:
    """The stage as a model: the very modules of `model`, hooks and all."""
    part = copy.copy(model)
    part._modules = dict(model._modules)
    keep(part, [stage])
    if "embed" not in stage:
        part.embed = None
    return part


def completed(model: nn.Module, used: Sequence[nn.Module], besides: str | None) -> dict[int, list[str]]:
    """By number of an action, whose stages are `used`: the parameters, last first, that no action after it uses."""
    names = {param: name for name, param in model.named_parameters()}
    last = {names[param]: number for number, stage in enumerate(used) for param in stage.parameters()}
    completes: dict[int, list[str]] = {number: [] for number in range(len(used))}
    for name in reversed(names.values()):
        if name in last and name != besides:
            completes[last[name]].append(name)
    return completes


class WeightsLater(TorchFunctionMode):
    """While entered, linears leave their weights' gradients out of backward; `run` computes them, after backward.

    A linear's backward is two products: one with the weight, for the gradient of its input, that the stage before waits
    for, and one with the input, for the gradient of its weight, that nobody waits for until the step ends. Until `run`,
    the inputs of all linears and the gradients of their outputs are kept. All else (biases, norms, the embedding) is
    little work and stays in backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self._late: deque[tuple[Tensor, Tensor, Tensor]] = deque()  # parameter, input, gradient of the output

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and torch.is_grad_enabled():
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def run(self) -> None:
        """Add the gradients that were put off, those of the last linear first."""
        while self._late:
            parameter, x, grad = self._late.popleft()
            parameter.backward((grad.flatten(0, -2).T @ x.flatten(0, -2)).to(parameter.dtype))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        parameter = _parameter(weight)
        if not x.requires_grad or parameter is None:
            return F.linear(x, weight, bias)

        def put_off(x: Tensor, grad: Tensor) -> None:
            self._late.append((parameter, x, grad))

        return cast(Tensor, _Linear.apply(x, weight.detach(), bias, put_off))  # type: ignore[no-untyped-call]


def _parameter(weight: Tensor) -> Tensor | None:
    """The parameter that backward from `weight` reaches, perhaps by a cast; None if it reaches others too, or none."""
    if weight.grad_fn is None:
        return weight if weight.requires_grad else None
    following = [function for function, _ in weight.grad_fn.next_functions if function is not None]
    return getattr(following[0], "variable", None) if len(following) == 1 else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.later, ctx.biased = later, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        ctx.later(x, grad)
        return grad @ weight, None, grad.flatten(0, -2).sum(0) if ctx.biased else None, None


def _balanced(weights: Sequence[int], parts: int) -> list[int]:
    """Where each of `parts` consecutive, non-empty parts ends, so that their weights' squares add up to the least."""
    sums = [0, *accumulate(weights)]
    best: list[tuple[float, list[int]]] = [(0.0, []), *((float("inf"), []) for _ in weights)]  # by end, with 0 parts
    for _ in range(parts):
        found: list[tuple[float, list[int]]] = [(float("inf"), [])]
        for end in range(1, len(sums)):
            cost, ends = min((best[start][0] + (sums[end] - sums[start]) ** 2, best[start][1]) for start in range(end))
            found.append((cost, [*ends, end]))
        best = found
    return best[-1][1]
