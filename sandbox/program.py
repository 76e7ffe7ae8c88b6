"""A training step as a record of the few things that a strategy may change. A strategy maps a Program to a Program.

The empty plan is `unsharded`: one process, the whole model. Every other plan is folded over it, each strategy wrapping
the slots it cares for, so the reference and the sharded run are the same code but for the cuts.

How a step runs (trainer.py drives, these slots do):

    forward_backward   for each microbatch:  begin(final) -> forward -> backward, grad_ready(name) ... -> reduce_grads
    clip               global norm, each logical element counted once
    optimizer.step     on `parameters`: the tensors this rank updates, by logical name
    refresh            the model sees what the optimizer did
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.comm import all_reduce
from sandbox.config import Config, Train
from sandbox.layout import Layout, local
from sandbox.mesh import Mesh
from sandbox.model import build, initial, loss_sum, routing_losses

__all__ = [
    "ForwardBackward",
    "Program",
    "empty",
    "learning_rate",
    "make_optimizer",
    "materialise",
    "replace_parameters",
    "shard_rows",
    "training_loss",
    "unless_stepped",
    "unsharded",
]

ForwardBackward: TypeAlias = "Callable[[Program, list[Batch], float], Tensor]"


@dataclass(frozen=True)
class Program:
    """What a rank runs. Frozen: a strategy returns a changed copy, made by `dataclasses.replace`."""

    config: Config
    model: nn.Module  # of this rank, on the meta device until a strategy or `materialise` gives it values
    parameters: Mapping[str, nn.Parameter]  # what the optimizer updates here, by logical name; may be a piece, or empty
    layout: Mapping[str, Layout]  # where each of `parameters` lies in its logical tensor
    initial: Callable[[str], Tensor]  # a logical parameter's first value, in full
    shard_batch: Callable[[Batch], Batch]  # the rows and columns that this rank sees
    loss: Callable[[Tensor, Tensor], Tensor]  # (logits, targets) as this rank has them -> sum over valid targets
    forward_backward: ForwardBackward  # (finished program, microbatches, valid targets of the step) -> local loss
    evaluate: "Callable[[Program, Batch], Tensor]"  # (finished program, batch) -> local sum of losses, no gradients
    begin: Callable[[bool], None]  # a backward pass comes; is it the last of the step?
    complete: Callable[[str], bool]  # something was added to a parameter's gradient: is it all, for this pass?
    grad_ready: Callable[[str], None]  # the gradient of a parameter of the model is complete for this backward pass
    reduce_grads: Callable[[], None]  # the backward pass is over: finish what is left to synchronise
    make_optimizer: "Callable[[Program], torch.optim.Optimizer]"
    refresh: Callable[[], None]  # `parameters` have changed: bring the model up to date
    clip: "Callable[[Program, float | None], Tensor]"  # scale gradients to a largest global norm -> norm before


def unsharded(config: Config, mesh: Mesh, device: torch.device) -> Program:
    """The program of one rank with an empty plan: what every strategy starts from."""
    model = build(config.model, config.train.dtype)
    shapes = dict(model.named_parameters())

    def value(name: str) -> Tensor:
        return initial(name, shapes[name].shape, config.model, config.train.seed, shapes[name].dtype).to(device)

    return empty(config, mesh, model, value)


def empty(config: Config, mesh: Mesh, model: nn.Module, value: Callable[[str], Tensor]) -> Program:
    """The empty plan over a `model` on the meta device, whose parameters have the first values `value(name)`."""
    shapes = dict(model.named_parameters())
    return Program(
        config=config,
        model=model,
        parameters=shapes,
        layout={name: Layout.whole(tuple(p.shape)) for name, p in shapes.items()},
        initial=value,
        shard_batch=lambda batch: batch,
        loss=loss_sum,
        forward_backward=accumulate,
        evaluate=lambda program, batch: program.loss(program.model(batch), batch.targets),
        begin=lambda final: None,
        complete=lambda name: True,
        grad_ready=lambda name: None,
        reduce_grads=lambda: None,
        make_optimizer=make_optimizer,
        refresh=lambda: None,
        clip=lambda program, most: clip(program, most, mesh),
    )


def materialise(program: Program) -> dict[str, nn.Parameter]:
    """Give every parameter of the model that is still on the meta device its initial value; return all by name."""
    new = {
        name: nn.Parameter(program.layout[name].take(program.initial(name)).clone()) if p.is_meta else p
        for name, p in program.model.named_parameters()
    }
    replace_parameters(program.model, new)
    return new


def replace_parameters(model: nn.Module, new: Mapping[str, nn.Parameter]) -> None:
    """Put `new` in place of the model's parameters of those names, wherever they are used (tied weights stay tied)."""
    swap = {old: new[name] for name, old in model.named_parameters() if name in new}
    for module in model.modules():
        for key, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if old in swap:
                setattr(module, key, swap[old])


def unless_stepped(optimizer: torch.optim.Optimizer, bring_up_to_date: Callable[[], None]) -> Callable[[], None]:
    """A `refresh` for an optimizer whose step brings the model up to date itself: for parameters that others changed.

    Others: a checkpoint that is put in.
    """
    stepped = False

    def after(*_: object) -> None:
        nonlocal stepped
        stepped = True

    def refresh() -> None:
        nonlocal stepped
        if not stepped:
            bring_up_to_date()
        stepped = False

    optimizer.register_step_post_hook(after)
    return refresh


def shard_rows(program: Program, mesh: Mesh) -> Callable[[Batch], Batch]:
    """A `shard_batch` that keeps this rank's consecutive rows; sizes differ by one row at most."""
    return lambda batch: program.shard_batch(batch).split_rows(mesh.data.size)[mesh.data.rank]


def accumulate(program: Program, microbatches: list[Batch], valid: float) -> Tensor:
    """Run all microbatches, one after the other. The default of `Program.forward_backward`.

    Each loss is a sum over its valid targets, divided by the valid targets of the WHOLE step, over ranks and
    microbatches, so a mean of means cannot arise.
    """
    total = torch.zeros((), dtype=torch.float64, device=microbatches[0].tokens.device)
    for number, batch in enumerate(microbatches, 1):
        program.begin(number == len(microbatches))
        loss = training_loss(program, batch) / valid
        loss.backward()
        program.reduce_grads()
        total += loss.detach()
    return total


def training_loss(program: Program, batch: Batch) -> Tensor:
    """What is trained on: the sum of losses over valid targets, and the sums that routers of experts add to it."""
    loss = program.loss(program.model(batch), batch.targets)
    return sum(routing_losses(program.model), start=loss)


def learning_rate(train: Train, step: int) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then the schedule, down to a tenth of `lr` at the last step."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    done = min(1.0, (step - train.warmup) / max(1, train.steps - 1 - train.warmup))
    if train.schedule == "constant":
        return train.lr
    left = 1 - done if train.schedule == "linear" else (1 + torch.cos(torch.tensor(torch.pi * done)).item()) / 2
    return train.lr * (0.1 + 0.9 * left)


def make_optimizer(program: Program, *, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer over this rank's parameters. Weight decay spares vectors, by the LOGICAL tensor's dimensions.

    `fused` takes one pass over the memory, where torch's other ways make a temporary of the gradients' size.
    """
    train = program.config.train
    here = {name: p for name, p in program.parameters.items() if p.numel()}
    matrix = {name: len(program.layout[name].shape) >= 2 for name in here}
    groups = [
        {"params": [p for name, p in here.items() if matrix[name]], "weight_decay": train.weight_decay},
        {"params": [p for name, p in here.items() if not matrix[name]], "weight_decay": 0.0},
    ]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=fused)
    momentum = train.momentum if train.optimizer == "sgd_momentum" else 0.0
    return torch.optim.SGD(groups, lr=train.lr, momentum=momentum, fused=fused)


def clip(program: Program, most: float | None, mesh: Mesh) -> Tensor:
    """Scale the gradients so that their global norm is at most `most`; return the norm before (float64).

    Pieces that several ranks hold are counted by the first of them only, so each logical element counts once. The
    factor is that of `torch.nn.utils.clip_grad_norm_`.
    """
    first = {axis: mesh.axis(axis).rank == 0 for axis in mesh.degrees}
    grads = {name: local(p.grad) for name, p in program.parameters.items() if p.grad is not None}
    sharded = {axis for layout in program.layout.values() for axis in layout.sharded}
    counted = [grad for name, grad in grads.items() if not sharded or _counts(program.layout[name], first)]
    square = torch.zeros((), dtype=torch.float64)
    if counted:
        square = torch.stack([n.double() for n in torch._foreach_norm(counted)]).square().sum()
    if sharded:
        square = all_reduce(square, mesh.everyone, "norm").wait()
    norm = square.sqrt()
    if most is not None and grads and (factor := most / (norm.item() + 1e-6)) < 1:
        torch._foreach_mul_(list(grads.values()), factor)
    return norm


def _counts(layout: Layout, first: Mapping[str, bool]) -> bool:
    return layout.copy == 0 and all(first[axis] or axis in layout.sharded for axis in first)
