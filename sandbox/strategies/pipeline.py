"""Pipeline parallelism: the model is cut into stages, and microbatches follow one another through them.

    tensor            before        in use         after backward
    parameter W       W_pp          -              -              those of the rank's stages, whole
    gradient  G       -             -              G_pp           summed over microbatches
    hidden    X       -             X[b, S, D]     -              from stage to stage; its gradient on the way back
    batch     B       B[M b, S]     B[b, S]        -              everywhere; the first reads tokens, the last targets

`schedule: 1f1b` with 3 ranks and 5 microbatches; F forward, B backward, which takes twice as long; `.` is the bubble:

    rank 0   F0 F1 F2 .  .  .  .  B0 B0 F3 B1 B1 F4 B2 B2 .  B3 B3 .  B4 B4
    rank 1   .  F0 F1 .  .  B0 B0 F2 B1 B1 F3 B2 B2 F4 B3 B3 .  B4 B4 .  .
    rank 2   .  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 F4 B4 B4 .  .  .  .

Bubble, the idle part of P ranks' time, for M microbatches, with v stages a rank and F = B of inputs = W of weights:

    gpipe, 1f1b                   (P-1) / (M + P-1)
    interleaved, breadth_first    (P-1) / (v M + P-1)
    zb_h1                         (P-1) / (3 M + P-1)
    zbv, dualpipe_v               (P-1) / (6 M + P-1)

Microbatches whose activations a rank keeps, at most: gpipe and breadth_first M; 1f1b, zb_h1 and zbv P; interleaved
P + (P-1)/v; dualpipe_v P + 1/2. `schedules.py` makes, checks and measures them.

Bytes sent by a rank in one step: X = M b S D elements over all microbatches for each border between a stage of its own
and one of another rank: forward where its stage comes first, backward where it comes second. A tied embedding lies on
the first and the last rank, and each sends the other its gradient, V D, unless that is one rank, as in a V.
Memory: parameters, gradients and optimizer state of the rank's stages, 1/P of the model.

Gradients of all microbatches add up, and the data strategy reduces once a step: each gradient when its last microbatch
has added to it. ZeRO-3 and FSDP keep a stage's parameters whole for the step, for they would be gathered anew for every
microbatch. In the zero-bubble schedules B computes gradients of inputs, and those of matrices wait for W: until then
the inputs of linears and the gradients of their outputs are kept; nothing is computed twice.

Sources: Huang et al., "GPipe", 2019; Narayanan et al., Megatron-LM, SC 2021 (1f1b, interleaved); Lamy-Poirier,
"Breadth-First Pipeline Parallelism", 2023; Qi et al., "Zero Bubble Pipeline Parallelism", 2023, and "Pipeline
Parallelism with Controllable Memory", 2024 (zbv); DeepSeek-AI, DeepSeek-V3, 2024, and DualPipe, 2025 (dualpipe_v).
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.comm import Axis
from sandbox.config import Config
from sandbox.mail import Mail
from sandbox.mesh import Mesh
from sandbox.model import Transformer, routing_losses
from sandbox.orders import Action
from sandbox.partition import even
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program
from sandbox.schedules import Schedule, make
from sandbox.stages import (
    Stage,
    StageOptions,
    WeightsLater,
    check_stages,
    completed,
    cut,
    keep,
    on_rank,
    shared_weight,
    view,
)
from sandbox.strategies import context

AXIS = "pp"

Name = Literal["gpipe", "1f1b", "interleaved", "breadth_first", "zb_h1", "zbv", "dualpipe_v"]


class Options(StageOptions):
    """Options of `pipeline`."""

    schedule: Name = Field("1f1b", description="which rank does what when")


def check(config: Config, options: Options) -> None:
    """Refuse another number of stages a rank than the schedule has, and more stages than there are parts."""
    check_stages(config, options)


def schedule(config: Config, options: Options) -> Schedule:
    """Who does what when."""
    return make(options.schedule, config.mesh.pp.degree, config.train.microbatches, options.each)


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with this rank's stages, run by the schedule."""
    axis, model = mesh.axis(AXIS), program.model
    assert isinstance(model, Transformer)
    order, stages, tied = _plan(model, program.config, options)
    mine = [stages[stage] for stage in order.held(axis.rank)]
    staged = on_rank(program, axis, mine, copied=tied if axis.rank == order.ends[1] else None)
    pipeline = Pipeline(axis, order, stages, tied)

    def grad_ready(name: str) -> None:
        program.grad_ready(name)
        pipeline.closing.pop(name, None)

    return replace(
        staged,
        forward_backward=pipeline.forward_backward,
        evaluate=pipeline.evaluate,
        complete=lambda name: name in pipeline.closing,
        grad_ready=grad_ready,
    )


class Pipeline:
    """Runs a rank's actions. What an action needs was asked for one action earlier, and travels meanwhile."""

    def __init__(self, axis: Axis, schedule: Schedule, stages: list[Stage], tied: str | None) -> None:
        self.axis, self.schedule, self.stages, self.tied = axis, schedule, stages, tied
        self.order = schedule.orders[axis.rank]
        self.mail = Mail(axis, schedule)
        self.closing: dict[str, None] = {}  # parameters whose gradient the action under way completes

    def forward_backward(self, program: Program, microbatches: list[Batch], valid: float) -> Tensor:
        """Run the schedule -> this rank's share of the loss: the last stage's, and what its routers add."""
        self._start(program, microbatches)
        program.begin(True)
        closing = completed(program.model, [self._views[action.stage] for action in self.order], besides=self.tied)
        for number, action in enumerate(self.order):
            self.mail.ask(self.order[number : number + 2])
            self.closing = dict.fromkeys(closing[number])
            if action.kind == "F":
                self._forward(action, valid)
            elif action.kind == "B":
                self._backward(action)
            else:
                self._later.pop((action.stage, action.microbatch)).run()
            for name in list(self.closing):  # of those that this action added to, autograd has told
                program.grad_ready(name)
        if self.tied and self.axis.rank in self.schedule.ends:
            self.mail.add_gradients(program.model.get_parameter(self.tied), self.schedule.ends)
            program.grad_ready(self.tied)
        self.mail.close()
        program.reduce_grads()
        return self._loss

    def evaluate(self, program: Program, batch: Batch) -> Tensor:
        """The sum of losses of one batch, without gradients."""
        self._start(program, [batch])
        for stage in self.schedule.held(self.axis.rank):
            action = Action("F", stage, 0)
            self.mail.ask([action])
            self._forward(action, valid=1)
        self.mail.close()
        return self._loss

    def _start(self, program: Program, batches: list[Batch]) -> None:
        model, device = program.model, batches[0].tokens.device
        assert isinstance(model, Transformer)
        self._program, self._batches = program, batches
        self._views = {stage: view(model, self.stages[stage]) for stage in self.schedule.held(self.axis.rank)}
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._live: dict[tuple[int, int], tuple[Tensor | None, Tensor, list[Tensor]]] = {}  # input, output, routing
        self._later: dict[tuple[int, int], WeightsLater] = {}
        self.mail.open([len(batch.rows) for batch in batches], model.dtype, device)

    def _forward(self, action: Action, valid: float) -> None:
        _, stage, number = action
        batch, x, training = self._batches[number], self.mail.take(action), torch.is_grad_enabled()
        if x is not None and training:
            x.requires_grad_()
        if training and (stage, number) in self.schedule.split:
            with WeightsLater() as self._later[stage, number]:
                out = self._views[stage](batch, x)
        else:
            out = self._views[stage](batch, x)
        if stage == self.schedule.stages - 1:
            out = self._program.loss(out, batch.targets) / valid
            self._loss += out.detach()
        else:
            self.mail.hand(Action("F", stage + 1, number), out.detach())
        routing = [loss / valid for loss in routing_losses(self._views[stage])]
        self._loss += sum(loss.detach() for loss in routing)
        if training:
            self._live[stage, number] = x, out, routing

    def _backward(self, action: Action) -> None:
        _, stage, number = action
        (x, out, routing), grad = self._live.pop((stage, number)), self.mail.take(action)
        torch.autograd.backward([out, *routing], [grad, *(None for _ in routing)])
        if x is not None:
            assert x.grad is not None
            self.mail.hand(Action("B", stage - 1, number), x.grad)


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank; cuts `model` down to its stages."""
    axis = mesh.axis(AXIS)
    assert isinstance(model, Transformer)
    order, stages, tied = _plan(model, config, options)
    item, own = model.dtype.itemsize, next(model.parameters()).element_size()
    keep(model, [stages[stage] for stage in order.held(axis.rank)])
    rows = even(config.train.batch, mesh.data.size)[mesh.data.rank]
    sent = order.messages(axis.rank) * rows * _columns(mesh, config) * config.model.width * item
    if tied and axis.rank in order.ends:
        tp = mesh.axis("tp")
        sent += even(config.model.padded_vocab, tp.size)[tp.rank] * config.model.width * own
    whole = bytes_of(model.parameters())
    memory = {"parameters": whole, "gradients": whole, "optimizer": state_copies(config.train) * whole}
    return Prediction({f"send {axis.name}": sent}, memory)


def _plan(model: Transformer, config: Config, options: Options) -> tuple[Schedule, list[Stage], str | None]:
    """The schedule, its stages, and the name of a weight that two ranks hold."""
    made = schedule(config, options)
    first, last = made.ends
    return made, cut(model, made.stages, options.cut), shared_weight(model) if first != last else None


def _columns(mesh: Mesh, config: Config) -> int:
    """Columns of what this rank hands on: cut by context parallelism, and by sequence parallelism within."""
    tp, count = mesh.axis("tp"), context.held(mesh, config)
    return even(count, tp.size)[tp.rank] if config.mesh.tp.options.get("sequence") else count
