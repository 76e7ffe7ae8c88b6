"""What launched ranks do in these tests, and what the tests say about it. Imports of pytest stay outside."""

import functools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from sandbox import units
from sandbox.batch import Batch
from sandbox.comm import Axis, Pending, all_gather, all_reduce, reduce_scatter
from sandbox.config import Config, Data, Model, Train
from sandbox.config import Mesh as MeshConfig
from sandbox.data import Corpus
from sandbox.mesh import Mesh
from sandbox.recorder import Recorder
from sandbox.runtime import Member, launch
from sandbox.trainer import Trainer
from sandbox.verify import Verifier
from sandbox.verify.capture import Capture, capture
from sandbox.verify.compare import assemble, differences

NATIVE = ("ddp", "zero1", "zero2", "zero3", "fsdp")
EXACT = 1e-12
TIMEOUT = 110.0
"""Seconds, so many that a world on a busy machine has them, and fewer than pytest gives a test."""

Prepare = Callable[[Trainer], Any]


@functools.cache
def verifier(*, measure: bool = False) -> Verifier:
    """One for the whole session, so that each reference is run once."""
    return Verifier(patient, measure=measure)


def patient(world: int, work: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
    """`launch`, with `TIMEOUT` at least."""
    return launch(world, work, *args, timeout=max(timeout, TIMEOUT))


def config(strategy: str = "ddp", world: int = 2, *, engine: str = "native", **sections: dict[str, Any]) -> Config:
    """A small training that hides nothing, with changes by section; `mesh` is that of the axis dp."""
    small = {"bucket_mb": 0.005} if strategy in ("ddp", "zero1", "zero2") else {}
    axis = {"degree": world, "strategy": strategy, **small, **sections.get("mesh", {})}
    model = {"layers": 3, "width": 16, "heads": 2, "hidden": 19, "norm": "layer", "bias": True, "init": "rough"}
    train = {"steps": 3, "batch": 11, "microbatches": 2, "optimizer": "sgd_momentum", "lr": 0.05, "clip": 0.5}
    return Config(
        engine=engine,
        mesh=MeshConfig.model_validate({"dp": axis}),
        model=Model.model_validate({**model, "qk_norm": True, **sections.get("model", {})}),
        data=Data.model_validate({"sequence": 12, "mask": "ragged", **sections.get("data", {})}),
        train=Train.model_validate({**train, "weight_decay": 0.1, "dtype": "float64", **sections.get("train", {})}),
    )


def trainer_of(member: Member, config: Config, recorder: Recorder | None = None) -> Trainer:
    mesh = Mesh(config.mesh.degrees, member.rank, "cpu", recorder)
    return Trainer(config, mesh, torch.device("cpu"), Corpus.load(config.data, config.model.vocab))


def ranks(config: Config, prepare: Prepare | None = None) -> list[Capture]:
    return launch(config.mesh.world, capture, config, prepare, timeout=TIMEOUT)


def alone(config: Config, prepare: Prepare | None = None) -> Capture:
    """The same training in one process, run once a session."""
    key = (config.reference().model_dump_json(), pickle.dumps(prepare))
    if key not in _alone:
        _alone[key] = ranks(config.reference(), prepare)[0]
    return _alone[key]


_alone: dict[tuple[str, bytes], Capture] = {}


def worst(found: Sequence[Capture], reference: Capture) -> float:
    """The largest error or drift of any gradient or parameter at any step, of losses and of norms."""
    errors = []
    for kind in ("gradients", "parameters"):
        expected, here = (assemble([getattr(rank, kind) for rank in ranks_]) for ranks_ in ([reference], found))
        for wanted, step in zip(expected, here, strict=True):
            wholes = {name: whole.value for name, whole in wanted.items()}
            errors += [max(d.error, d.drift) for d in differences(step, wholes, {})]
    for step, (loss, norm) in enumerate(zip(reference.losses, reference.norms, strict=True)):
        errors.append(abs(sum(rank.losses[step] for rank in found) / loss - 1))
        errors += [abs(rank.norms[step] / norm - 1) for rank in found]
    return max(errors)


def same_bits(one: Capture, other: Capture) -> bool:
    """Whether two ranks did the same to the bit."""
    pairs = [
        (a[name].local, b[name].local)
        for kind in ("gradients", "parameters")
        for a, b in zip(getattr(one, kind), getattr(other, kind), strict=True)
        for name in {*a, *b}
    ]
    return one.losses == other.losses and one.norms == other.norms and all(torch.equal(a, b) for a, b in pairs)


# Collectives

SIZES = {
    "even": (5, 5, 5, 5),
    "uneven": (3, 1, 4, 2),
    "holes": (0, 7, 0, 2),
    "nothing": (0, 0, 0, 0),
    "large": (70_000, 80_000, 60_000, 0),  # more than 1 MiB in float64
}


def numbers(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """What a rank brings to a collective: never twice the same, and sums that are not exact."""
    return torch.randn(count, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def axis_of(member: Member, recorder: Recorder | None = None) -> Axis:
    return Mesh({"dp": member.world}, member.rank, "cpu", recorder).axis("dp")


def collectives(member: Member) -> dict[str, Tensor]:
    """All of them at all sizes and dtypes; `again` holds a repetition."""
    axis, results = axis_of(member), {}
    for turn in ("", " again"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for label, all_sizes in SIZES.items():
                sizes, name = all_sizes[: member.world], f"{label} {dtype}{turn}"
                mine = numbers(member.rank, sum(sizes), dtype)
                wide = torch.promote_types(dtype, torch.float32)
                results[f"reduce_scatter {name}"] = reduce_scatter(mine.clone(), sizes, axis, wide).wait()
                results[f"all_reduce {name}"] = all_reduce(mine.clone(), axis).wait()
                flat = torch.full_like(mine, torch.nan)
                own = flat.split(sizes)[member.rank]
                own.copy_(numbers(member.rank, len(own), dtype))
                results[f"all_gather {name}"] = all_gather(flat, sizes, axis).wait()
    return results


def crossed_size(number: int) -> int:
    """Elements of a part in a round: many, or few."""
    return 2**20 if number % 2 else 4


def crossed(member: Member, rounds: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gathers and reductions under way at once, little and much by turns, and awaited in another order on odd ranks."""
    axis = axis_of(member)
    gathers: list[Pending] = []
    scatters: list[Pending] = []

    for number in range(rounds):
        sizes = [crossed_size(number)] * member.world
        flat = torch.zeros(sum(sizes))
        flat.split(sizes)[member.rank].fill_(10 * number + member.rank)
        gathers.append(all_gather(flat, sizes, axis))
        flat = torch.full((sum(sizes),), 10.0 * number + member.rank)
        scatters.append(reduce_scatter(flat, sizes, axis, torch.float32))
    if member.rank % 2:
        first = [pending.wait() for pending in scatters]
        return [pending.wait() for pending in gathers], first
    return [pending.wait() for pending in gathers], [pending.wait() for pending in scatters]


def recorded(member: Member) -> tuple[dict[str, float], list[tuple[int, str, str, float, bool]], str]:
    """What the recorder says of one collective of each kind, and what the board says after it."""
    recorder = Recorder(board=member.board, detailed=True)
    axis, sizes = axis_of(member, recorder), SIZES["uneven"][: member.world]
    flat = numbers(member.rank, sum(sizes), torch.float32)
    reduce_scatter(flat.clone(), sizes, axis, torch.float32).wait()
    all_gather(flat.clone(), sizes, axis).wait()
    all_reduce(flat.clone(), axis).wait()
    all_reduce(flat.clone(), axis, "norm").wait()
    events = [(e.number, e.op, e.axis, e.bytes, e.end >= e.start > 0) for e in recorder.events]
    return dict(recorder.sent), events, str(member.board.read())


# Mesh


def places(member: Member, degrees: dict[str, int], axes: Sequence[tuple[str, ...]]) -> list[tuple[Any, ...]]:
    """For each of `axes`: size, rank, what torch says of the rank along each name, the group's members, a gather."""
    mesh = Mesh(degrees, member.rank, "cpu")
    assert mesh.device_mesh is not None
    found = []
    for names in axes:
        axis = mesh.axis(*names)
        wide = [name for name in names if degrees[name] > 1]
        by_torch = [mesh.device_mesh.get_local_rank(name) for name in wide]
        members = dist.get_process_group_ranks(axis.group) if axis.group else [member.rank]
        flat = torch.zeros(axis.size)
        flat[axis.rank] = member.rank
        gathered = all_gather(flat, [1] * axis.size, axis).wait().int().tolist()
        found.append((axis.size, axis.rank, by_torch, members, gathered))
    return found


def mesh_of(member: Member, degrees: dict[str, int]) -> None:
    Mesh(degrees, member.rank, "cpu")


# Tampering that must change nothing, or the same on every layout


def nothing(trainer: Trainer) -> None:
    """Change nothing."""


class OnSomeRows(nn.Module):
    """Applies a norm to the rows [start, stop) of the global batch; if there are none, the norm is not used at all."""

    def __init__(self, inner: nn.Module, trainer: Trainer, start: int, stop: int) -> None:
        super().__init__()
        self.inner, self.start, self.stop = inner, start, stop
        self.rows = torch.tensor([])
        trainer.program.model.register_forward_pre_hook(self.remember)

    def remember(self, module: nn.Module, args: tuple[Batch, ...]) -> None:
        self.rows = args[0].rows

    def forward(self, x: Tensor) -> Tensor:
        some = (self.rows >= self.start) & (self.rows < self.stop)
        if not some.any():
            return x
        return torch.stack([self.inner(row) if use else row for row, use in zip(x, some.tolist(), strict=True)])


def unused_parameter(trainer: Trainer, start: int, stop: int) -> None:
    """The last block's key norm sees only some rows, so whoever has none of them does not use it."""
    last = list(trainer.program.model.get_submodule("blocks").children())[-1]
    attention = last.get_submodule("attention")
    attention.k_norm = OnSomeRows(attention.k_norm, trainer, start, stop)


class Recomputed(nn.Module):
    """A block whose activations are computed again in backward, its hooks and all."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, batch: Batch) -> Any:
        return recomputed(self.block, x, batch, use_reentrant=False)


def recompute_outside(trainer: Trainer) -> None:
    """Recompute each block together with the hooks that strategies put on it."""
    blocks = trainer.program.model.get_submodule("blocks")
    for key, block in list(blocks.named_children()):
        setattr(blocks, key, Recomputed(block))


def recompute_inside(trainer: Trainer) -> None:
    """Recompute what each block does within its hooks."""
    for block in trainer.program.model.get_submodule("blocks").children():
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)


def validate_between(trainer: Trainer) -> None:
    """Validate before the first step and after each."""
    update = trainer.update

    def update_and_validate() -> Tensor:
        norm = update()
        trainer.validate()
        return norm

    trainer.validate()
    trainer.update = update_and_validate  # type: ignore[method-assign]


def not_a_number(trainer: Trainer, what: str) -> None:
    """The second step reports NaN for its loss or its norm, and does everything else right."""
    inner = getattr(trainer.program, what)

    def tainted(*args: Any) -> Tensor:
        value = inner(*args)
        return value * torch.nan if trainer.step == 1 else value

    trainer.program = replace(trainer.program, **{what: tainted})


def raise_on_one_rank(trainer: Trainer) -> None:
    if trainer.mesh.rank == 1:
        raise ValueError("planted")


# Trainers


def steps_and_validation(member: Member, config: Config) -> tuple[list[tuple[float, float, float]], list[float]]:
    """Loss, norm and rate of each step; losses on the held-out text, before and after."""
    trainer = trainer_of(member, config)
    before = trainer.validate()
    steps = [(step.loss, step.grad_norm, step.lr) for step in trainer.run()]
    return steps, [before, trainer.validate(), trainer.validate()]


def losses(member: Member, config: Config) -> list[float]:
    """On the held-out text, before and between steps; and of the steps, as each rank reports them."""
    trainer = trainer_of(member, config)
    found = [trainer.validate()]
    for _ in range(2):
        found += [trainer.train_step().loss, trainer.validate()]
    return found


def lifetimes(member: Member, config: Config, prepare: Prepare | None = None) -> dict[str, Any]:
    """Names of the units that are whole (or on their way) at every moment of a step that is of interest."""
    shards: list[units.Shard] = []
    make = units.Shard.__init__

    def remember(shard: units.Shard, unit: units.Unit, *args: Any) -> None:
        make(shard, unit, *args)
        shard.__dict__["label"] = unit.name
        shards.append(shard)

    units.Shard.__init__ = remember  # type: ignore[method-assign]
    trainer = trainer_of(member, config)
    if prepare:
        prepare(trainer)

    def whole() -> list[str]:
        return [
            shard.__dict__["label"]
            for shard in shards
            if shard.whole.untyped_storage().nbytes() or shard.is_whole or shard._pending
        ]

    seen: dict[str, Any] = {"start": whole(), "forward": [], "backward": []}
    phase, backward = ["forward"], torch.Tensor.backward

    def note(*_: Any) -> None:
        seen[phase[0]].append(whole())

    def begin_backward(tensor: Tensor) -> None:
        seen["between"] = whole()
        phase[0] = "backward"
        backward(tensor)
        phase[0] = "forward"

    torch.Tensor.backward = begin_backward  # type: ignore[assignment,method-assign]
    for module in trainer.program.model.modules():
        if not list(module.children()):
            module.register_forward_hook(note)
            if list(module.parameters()) and not isinstance(module, nn.Embedding):
                module.register_full_backward_hook(note)
    trainer.compute_gradients(trainer.batch())
    seen["after backward"] = whole()
    trainer.update()
    seen["after step"] = whole()
    trainer.validate()
    seen["after validation"] = whole()
    seen["held"] = {shard.__dict__["label"]: (shard.part.numel(), sum(shard.sizes)) for shard in shards}
    return seen


def deaf_to_keys(trainer: Trainer) -> None:
    """In the last block each token sees itself alone, so that keys and queries do not matter."""
    last = list(trainer.program.model.get_submodule("blocks").children())[-1]
    attention = last.get_submodule("attention")
    attention.core = lambda q, k, v, batch: v.repeat_interleave(q.shape[1] // v.shape[1], 1)  # type: ignore[assignment]
