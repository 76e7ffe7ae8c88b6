"""torch.distributed.pipelining: a PipelineStage for each of the rank's stages, run by torch's own schedules.

    tensor            before        in use         after backward
    parameter W       W_pp          -              -              those of the rank's stages, whole
    gradient  G       -             -              G_pp           summed over microbatches
    hidden    X       -             X[b, S, D]     -              from stage to stage; its gradient on the way back
    batch     B       B[M b, S]     B[b, S]        -              everywhere; the first reads tokens, the last targets

Schedules, and torch's names of them; those with several stages a rank in a loop, or two in a V:

    gpipe, 1f1b                                   GPipe, 1F1B
    interleaved, breadth_first, interleaved_zb    Interleaved1F1B, LoopedBFS, InterleavedZeroBubble
    zbv, dualpipe_v                               ZBVZeroBubble, DualPipeV

Bytes sent by a rank in one step: X = M b S D elements over all microbatches for each border between a stage of its own
and one of another rank: forward where its stage comes first, backward where it comes second. Buffers are made for the
first microbatch, so all must have one size: those with a row less get one of padding, which has no target and whose
loss is 0. Before the first step a stage runs once to learn its shapes, and hands them on. A tied embedding lies on the
first and the last rank; torch leaves it to the user, so each sends the other its gradient, V D, after the step.
Memory: parameters, gradients and optimizer state of the rank's stages, 1/P of the model.

A loss is a sum, divided by all valid targets of the step, so gradients must not be scaled by 1/M, as torch does unless
told not to (`scale_grads=False`): right only for means over microbatches with as many targets each.

Under FSDP or `replicate` each stage is a root, and torch's stage reduces its gradients after its last microbatch; it
keeps parameters whole until then. InterleavedZeroBubble, ZBVZeroBubble and DualPipeV take backward apart with
`torch.autograd.grad`: for inputs, and then for weights, a few at a time. With `train.recompute` each of these calls
computes a block again, some ten times in all, where ours does it once.

Sources: as the native pipeline's; torch.distributed.pipelining.schedules.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.comm import Axis, receive, send
from sandbox.config import Config
from sandbox.engines.torch._dtensors import microbatch_rows, own_rows
from sandbox.errors import ConfigError
from sandbox.layout import local
from sandbox.mesh import Mesh
from sandbox.model import Transformer
from sandbox.orders import LOOPED, VS
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program
from sandbox.schedules import borders, homes
from sandbox.stages import Stage, StageOptions, check_stages, cut, keep, on_rank, shared_weight, view

AXIS = "pp"

Name = Literal["gpipe", "1f1b", "interleaved", "breadth_first", "interleaved_zb", "zbv", "dualpipe_v"]
NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "breadth_first": "LoopedBFS",
    "interleaved_zb": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipe_v": "DualPipeV",
}
APART = ("interleaved_zb", *VS)


class Options(StageOptions):
    """Options of `pipeline`."""

    schedule: Name = Field("1f1b", description="which rank does what when")
    looped: ClassVar[tuple[str, ...]] = (*LOOPED, "interleaved_zb")


def check(config: Config, options: Options) -> None:
    """Refuse what torch's schedules refuse, and more stages than there are parts."""
    if config.model.experts:
        raise ConfigError(
            "model.experts: torch's schedules take the loss of the last stage alone, and experts add theirs on every "
            "stage. Set engine: native."
        )
    check_stages(config, options)
    name, degree, count = options.schedule, config.mesh.pp.degree, config.train.microbatches
    other = "1f1b" if count >= degree else "gpipe"
    if config.model.tied and name in VS and config.mesh.dp.degree > 1:
        raise ConfigError(
            f"model.tied: schedule {name} has embedding and head on one rank, as two stages; torch's FSDP and "
            "replicate take each stage as a root, and two roots cannot share a weight. "
            f"Set mesh.pp.schedule: {other}."
        )
    if name in APART and config.train.recompute != "none" and config.mesh.tp.degree > 1:
        raise ConfigError(
            f"train.recompute: torch's {NAMES[name]} would compute a block, and its collectives over tp, again for "
            f"every few weights. Set train.recompute: none, or mesh.pp.schedule: {other}."
        )
    rounds = max(1, count // degree)
    if name in ("interleaved", "interleaved_zb") and count % rounds:
        raise ConfigError(
            f"train.microbatches {count}: torch's {NAMES[name]} runs them in {rounds} rounds of equal size over "
            f"{degree} ranks. Set train.microbatches: {count - count % degree}."
        )
    least = {"1f1b": degree, "dualpipe_v": 2 * degree}.get(name, 1)
    if count < least:
        rows = least * config.mesh.dp.degree
        more = f" with train.batch: {rows}" if rows > config.train.batch else ""
        raise ConfigError(
            f"train.microbatches {count}: torch's {NAMES[name]} needs one for each of {least} stages. "
            f"Set mesh.pp.schedule: gpipe, or train.microbatches: {least}{more}."
        )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with this rank's stages, run by one of torch's schedules."""
    axis, model = mesh.axis(AXIS), program.model
    assert isinstance(model, Transformer)
    home, stages, tied = _plan(model, program.config, options)
    first, last = home[0], home[-1]
    mine = {number: stages[number] for number, rank in enumerate(home) if rank == axis.rank}
    staged = on_rank(program, axis, list(mine.values()), copied=tied if axis.rank == last else None)
    pipeline = Pipeline(mesh, options, model, mine, home)

    def forward_backward(finished: Program, microbatches: list[Batch], valid: float) -> Tensor:
        finished.begin(True)
        loss = pipeline.run(finished, microbatches, valid)
        finished.reduce_grads()
        if tied and axis.rank in (first, last):
            add_gradients(finished.parameters[tied], axis, other=first + last - axis.rank)
        return loss

    def evaluate(finished: Program, batch: Batch) -> Tensor:
        return pipeline.run(finished, batch.split_rows(program.config.train.microbatches), 1)

    return replace(staged, forward_backward=forward_backward, evaluate=evaluate)


def add_gradients(param: nn.Parameter, axis: Axis, other: int) -> None:
    """Sum the gradient of a weight over the two ranks that hold it."""
    assert param.grad is not None
    grad = local(param.grad).contiguous()
    sending = send(grad, axis, other, 0)
    theirs = receive(torch.empty_like(grad), axis, other, 0).wait()
    sending.wait()
    local(param.grad).add_(theirs)


class Pipeline:
    """The stages of a rank as torch's pipelining wants them, and its schedules, one for each number of rows."""

    def __init__(
        self, mesh: Mesh, options: Options, model: Transformer, stages: dict[int, Stage], home: list[int]
    ) -> None:
        self.axis, self.options, self.home = mesh.axis(AXIS), options, home
        self.numbers = list(stages)
        self.views: list[nn.Module] = [self._view(model, stage) for stage in stages.values()]
        model.stages = self.views  # type: ignore[assignment]  # where strategies that wrap stages find them
        self.schedules: dict[tuple[int, bool], Any] = {}

    def run(self, program: Program, batches: list[Batch], valid: float) -> Tensor:
        """Run the schedule over microbatches -> this rank's share of the loss: where the last stage is all, or 0."""
        rows = max(len(batch.rows) for batch in batches)
        self.program, self.valid = program, valid
        self.batches = [batch.filled(rows) for batch in batches]
        training = torch.is_grad_enabled()
        if (rows, training) not in self.schedules:
            self.schedules[rows, training] = self._schedule(len(batches), training)
        schedule = self.schedules[rows, training]
        losses: list[Tensor] = []
        number = torch.arange(len(batches))  # all that torch has to cut into microbatches
        given = (number,) if self.home[0] == self.axis.rank else ()
        told = {"number": number, "target": number if self.home[-1] == self.axis.rank else None, "losses": losses}
        if training:
            schedule.step(*given, **told, return_outputs=False)
        else:
            schedule.eval(*given, **told)
        zero = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
        return sum((loss.detach() for loss in losses), start=zero)

    def _view(self, model: Transformer, stage: Stage) -> nn.Module:
        part = view(model, stage)
        for name, value in vars(part).items():
            if name.endswith("hooks") or "hooks_" in name:
                setattr(part, name, copy.copy(value))  # its own, for whoever wraps it hooks into it

        def give(module: nn.Module, args: Any, kwargs: Any) -> Any:
            batch = self.batches[int(kwargs["number"])]
            return ((batch,) if "embed" in stage else (batch, *args)), {}

        part.register_forward_pre_hook(give, with_kwargs=True)
        return part

    def _schedule(self, microbatches: int, training: bool) -> Any:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

        device = self.batches[0].tokens.device
        stages = [
            PipelineStage(part, number, len(self.home), device, group=self.axis.group)
            for number, part in zip(self.numbers, self.views, strict=True)
        ]
        kind = get_schedule_class(NAMES[self.options.schedule])
        what: Any = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        schedule = kind(what, microbatches, loss_fn=self._loss, scale_grads=False)
        if not training and self.options.schedule in VS:  # `eval` trips over gradients from a stage of the same rank
            orders = schedule.pipeline_order_with_comms
            schedule.pipeline_order_with_comms = {rank: list(forwards(order)) for rank, order in orders.items()}
        return schedule

    def _loss(self, logits: Tensor, number: Tensor) -> Tensor:
        return self.program.loss(logits, self.batches[int(number)].targets) / self.valid


def forwards(actions: Iterable[Any]) -> Iterator[Any]:
    """Of the actions of a torch schedule, those that an evaluation needs; such as consist of two are taken apart."""
    for action in actions:
        if action.sub_actions:
            yield from forwards(action.sub_actions)
        elif action.computation_type.name in ("FORWARD", "SEND_F", "RECV_F", "UNSHARD", "RESHARD"):
            yield action


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank; cuts `model` down to its stages."""
    axis = mesh.axis(AXIS)
    assert isinstance(model, Transformer)
    home, stages, tied = _plan(model, config, options)
    item, own = model.dtype.itemsize, next(model.parameters()).element_size()
    keep(model, [stage for stage, rank in zip(stages, home, strict=True) if rank == axis.rank])
    tp, shard = mesh.axis("tp"), mesh.axis("dp_shard")
    columns = config.data.sequence // (tp.size if config.mesh.tp.options.get("sequence") else 1)
    sent = borders(home, axis.rank) * sum(microbatch_rows(mesh, config)) * columns * config.model.width * item
    if tied and axis.rank in (home[0], home[-1]):
        words = own_rows(config.model.padded_vocab, tp.size, tp.rank)
        if config.mesh.dp.strategy == "fsdp":
            words = own_rows(words, shard.size, shard.rank)
        sent += words * config.model.width * own
    whole = bytes_of(model.parameters())
    memory = {"parameters": whole, "gradients": whole, "optimizer": state_copies(config.train) * whole}
    return Prediction({f"send {axis.name}": sent}, memory)


def _plan(model: Transformer, config: Config, options: Options) -> tuple[list[int], list[Stage], str | None]:
    """The rank of each stage, the stages, and the name of a weight that two ranks hold."""
    degree = config.mesh.pp.degree
    total = degree * options.each
    home = homes(options.schedule, degree, total)
    tied = shared_weight(model) if home[0] != home[-1] else None
    return home, cut(model, total, options.cut), tied
