"""What launched ranks do in the tests of checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoint_kills as kills
import torch
import world

from sandbox import checkpoint
from sandbox.batch import Batch
from sandbox.checkpoint import folder as folders
from sandbox.checkpoint import storage, whole
from sandbox.checkpoint.together import Together
from sandbox.comm import all_reduce
from sandbox.config import Config
from sandbox.errors import CheckpointError
from sandbox.layout import Layout, local
from sandbox.runtime import Member, launch
from sandbox.trainer import Trainer
from sandbox.verify.capture import Capture, Pieces
from sandbox.verify.compare import assemble, differences

Prepare = Callable[[Trainer], Any]

# Every cut there is: boxes, ranges, whole parameters, rows, columns, stages, and some of them in one another.
LAYOUTS: dict[str, dict[str, Any]] = {
    "unsharded": {},
    "zero1 x 3": {"dp": {"degree": 3, "strategy": "zero1", "bucket_mb": 0.005}},
    "fsdp 2 x 2": {"dp": {"degree": 4, "strategy": "fsdp", "replicas": 2}},
    "tp 2": {"tp": {"degree": 2, "sequence": True}},
    "zero3 x 3": {"dp": {"degree": 3, "strategy": "zero3"}},
    # Buckets of the tensor-parallel ranks are cut differently, and so are the norms in them that all of these hold.
    "tp 3 in zero2 x 2": {"tp": {"degree": 3}, "dp": {"degree": 2, "strategy": "zero2", "bucket_mb": 0.002}},
    "torch fsdp x 3": {"engine": "torch", "dp": {"degree": 3, "strategy": "fsdp"}},
    "cp 2 in ddp x 2": {"cp": {"degree": 2}, "dp": {"degree": 2, "strategy": "ddp"}},
    "torch zero1 x 3": {"engine": "torch", "dp": {"degree": 3, "strategy": "zero1"}},
    "pp 2 in zero3 x 2": {"pp": {"degree": 2}, "dp": {"degree": 2, "strategy": "zero3"}},
    "torch ddp x 3": {"engine": "torch", "dp": {"degree": 3, "strategy": "ddp"}},
    "tp 2 in fsdp x 2 in pp 2": {"pp": {"degree": 2}, "dp": {"degree": 2, "strategy": "fsdp"}, "tp": {"degree": 2}},
}

# Those of libraries: ranges of a whole group, of a bucket, of a parameter; boxes; whole parameters at their owners.
LIBRARIES: dict[str, dict[str, Any]] = {
    "deepspeed zero2 x 2": {"engine": "deepspeed", "dp": {"degree": 2, "strategy": "zero2"}},
    "zero2 x 3": {"dp": {"degree": 3, "strategy": "zero2", "bucket_mb": 0.005}},
    "accelerate zero3 x 2": {"engine": "accelerate", "dp": {"degree": 2, "strategy": "zero3"}},
    "tp 2": LAYOUTS["tp 2"],
    "deepspeed zero1 x 2, tp 2": {
        "engine": "deepspeed",
        "dp": {"degree": 2, "strategy": "zero1"},
        "tp": {"degree": 2},
    },
    "fairscale fsdp x 2": {"engine": "fairscale", "dp": {"degree": 2, "strategy": "fsdp"}},
    "deepspeed zero3 x 3": {"engine": "deepspeed", "dp": {"degree": 3, "strategy": "zero3", "offload": True}},
    "fairscale zero2 x 3": {"engine": "fairscale", "dp": {"degree": 3, "strategy": "zero2"}},
    "deepspeed tp 2": {"engine": "deepspeed", "tp": {"degree": 2}},
    "accelerate fsdp x 2, tp 2": {
        "engine": "accelerate",
        "dp": {"degree": 2, "strategy": "fsdp"},
        "tp": {"degree": 2},
    },
}


def config(layout: str = "unsharded", **sections: dict[str, Any]) -> Config:
    """The training of `world.config`, with grouped heads and a tied head, in one of LAYOUTS or LIBRARIES."""
    mesh = dict((LAYOUTS | LIBRARIES)[layout])
    engine = mesh.pop("engine", "native")
    model = {"heads": 4, "kv_heads": 2, "tied": True, **sections.pop("model", {})}
    base = world.config(world=1, engine=engine, model=model, **sections)
    return Config.model_validate({**base.model_dump(), "mesh": mesh})


def one(**sections: dict[str, Any]) -> Trainer:
    """A small trainer in this process."""
    model = {"layers": 1, **sections.pop("model", {})}
    return world.trainer_of(Member(), world.config(world=1, model=model, **sections))


def straight_on(member: Member, config: Config, folder: Path, at: int) -> list[Any]:
    """Train to the end, saving after step `at` while the training goes on -> what came after it."""
    trainer = world.trainer_of(member, config)
    while trainer.step < at:
        trainer.train_step()
    with checkpoint.Saver(folder, asynchronous=True) as saver:
        saver.save(trainer)
        return rest(trainer)


def resume(member: Member, config: Config, folder: Path) -> list[Any]:
    """Restore the newest checkpoint and train to the end -> what came after it."""
    trainer = world.trainer_of(member, config)
    checkpoint.restore(trainer, checkpoint.latest(folder))
    return rest(trainer)


def resume_unsettled(member: Member, config: Config, folder: Path) -> list[Any]:
    """As `resume`, but a library's first backward pass is the first after the checkpoint."""
    trainer = world.trainer_of(member, config)
    trainer.compute_gradients = lambda batch: torch.zeros(())  # type: ignore[method-assign]
    checkpoint.restore(trainer, checkpoint.latest(folder))
    del trainer.compute_gradients
    return rest(trainer)


def rest(trainer: Trainer) -> list[Any]:
    """Of each step: number, loss, norm, rate, this rank's gradients; its parameters and those its model uses."""
    steps = []
    while trainer.step < trainer.config.train.steps:
        loss = trainer.compute_gradients(trainer.batch()).item()
        gradients = [piece.local for piece in pieces(trainer, gradients=True).values()]
        norm, rate = trainer.update().item(), trainer.optimizer.param_groups[0]["lr"]
        steps.append((trainer.step, loss, norm, rate, gradients))
    used = [local(p.detach()) for p in trainer.program.model.parameters()]
    model = [tensor.clone() for tensor in used if tensor.untyped_storage().nbytes()]  # what is freed cannot be read
    return [steps, [piece.local for piece in pieces(trainer).values()], model]


def leg(
    member: Member, config: Config, start: Path, again: Path, to: Path, tamper: Prepare | None = None
) -> tuple[float, float, Pieces, Pieces]:
    """Restore the newest checkpoint of `start`, if there is one, save it `again`, train one step, save in `to`.

    -> loss, norm, this rank's gradients, its parameters.
    """
    trainer = world.trainer_of(member, config)
    if start.exists():
        checkpoint.restore(trainer, checkpoint.latest(start))
        checkpoint.save(trainer, again)
    if tamper:
        tamper(trainer)
    share = trainer.compute_gradients(trainer.batch())
    loss = all_reduce(share, trainer.mesh.axis("pp", "dp_replicate", "dp_shard", "ep", "cp"), "loss").wait().item()
    gradients = pieces(trainer, gradients=True)
    norm = trainer.update().item()
    checkpoint.save(trainer, to)
    return loss, norm, gradients, pieces(trainer)


def pieces(trainer: Trainer, *, gradients: bool = False) -> Pieces:
    layout = trainer.program.layout
    tensors = {n: p.grad if gradients else p for n, p in trainer.program.parameters.items()}
    held = {n: t for n, t in tensors.items() if t is not None}
    return Pieces.of({n: layout[n] for n in held}, held.values())


def relay(layouts: list[str], folder: Path, tamper: Prepare | None = None, **train: Any) -> list[float]:
    """`relay_of` the training of `config` through `layouts`."""
    sections: dict[str, Any] = {"train": {"steps": len(layouts), **train}, "model": {"dropout": 0.2}}
    return relay_of([config(layout, **sections) for layout in layouts], folder, tamper)


def relay_of(configs: Sequence[Config], folder: Path, tamper: Prepare | None = None) -> list[float]:
    """Train one step by each of `configs`, each going on from the last one's checkpoint -> each step's largest error.

    The error is that of loss, norm, gradients and parameters against the same training in one process.
    """
    reference, errors, start = world.alone(configs[0]), [], folder / "none"
    for step, settings in enumerate(configs):
        again, to = folder / f"{step}-again", folder / f"{step}"
        planted = tamper if step else None
        ranks = launch(settings.mesh.world, leg, settings, start, again, to, planted, timeout=world.TIMEOUT)
        if step:
            assert same(whole.load(checkpoint.latest(again)), whole.load(checkpoint.latest(start))), settings.mesh
        errors.append(error(ranks, reference, step))
        start = to
    return errors


def error(ranks: list[tuple[float, float, Pieces, Pieces]], reference: Capture, step: int) -> float:
    losses, norms, gradients, parameters = zip(*ranks, strict=True)
    found = [abs(loss / reference.losses[step] - 1) for loss in losses]
    found += [abs(norm / reference.norms[step] - 1) for norm in norms]
    for pieces, expected in ((gradients, reference.gradients[step]), (parameters, reference.parameters[step + 1])):
        (wanted,), (held,) = assemble([[expected]]), assemble([[one] for one in pieces])
        found += [
            max(d.error, d.drift) for d in differences(held, {name: one.value for name, one in wanted.items()}, {})
        ]
    return max(found)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# Bugs of resuming that really happened, planted after a restore that was right


def merged_in_string_order(trainer: Trainer) -> None:
    """55: pieces are put together in the order of file names, in which rank 10 comes before rank 2."""
    param = trainer.program.parameters["embed.weight"]
    parts = local(param.detach()).tensor_split(11)
    order = sorted(range(len(parts)), key=str)
    with torch.no_grad():
        local(param).copy_(torch.cat([parts[rank] for rank in order]))
    trainer.program.refresh()


def fused_heads_split_flat(trainer: Trainer) -> None:
    """56: of keys and values stored as one, a rank takes its rows by their number, not by heads."""
    with torch.no_grad():
        for name, param in trainer.program.parameters.items():
            if name.endswith("attention.k.weight"):
                value = trainer.program.parameters[name.replace(".k.", ".v.")]
                fused = torch.stack((local(param), local(value)), 1).flatten(0, 1)
                first, second = fused.chunk(2)
                local(param).copy_(first), local(value).copy_(second)
    trainer.program.refresh()


def moments_dropped(trainer: Trainer) -> None:
    """57: the optimizer starts anew."""
    trainer.optimizer.state.clear()


def not_gathered_after_the_load(trainer: Trainer) -> None:
    """57: the pieces are loaded, but the model still computes with what it was made with."""
    with torch.no_grad():
        for name, param in trainer.program.model.named_parameters():
            param.copy_(trainer.program.layout[name].take(trainer.program.initial(name)))


def randomness_of_another_rank(trainer: Trainer) -> None:
    """58: dropout goes on from what another rank had."""
    shard = trainer.program.shard_batch
    rank = trainer.mesh.rank

    def shifted(batch: Batch) -> Batch:
        return replace(shard(batch), key=batch.key + (rank > 0))

    trainer.program = replace(trainer.program, shard_batch=shifted)


def order_of_the_data_starts_anew(trainer: Trainer) -> None:
    """59: the first batches come again."""
    corpus, train = trainer.corpus, trainer.config.train
    first = trainer.step
    trainer.batch = lambda: corpus.batch(trainer.step - first, seed=train.seed, rows=train.batch)  # type: ignore[method-assign]


def moments_by_unsorted_names(trainer: Trainer) -> None:
    """60: moments are matched to parameters by their number in a list that was sorted otherwise."""
    state, params = trainer.optimizer.state, trainer.program.parameters
    shaped: dict[Any, list[Any]] = {}
    for param in params.values():
        if param in state:
            shaped.setdefault(tuple(param.shape), []).append(param)
    for same in shaped.values():
        found = [state[param] for param in same]
        for param, other in zip(same, found[1:] + found[:1], strict=True):
            state[param] = other


BUGS = (
    merged_in_string_order, fused_heads_split_flat, moments_dropped, not_gathered_after_the_load,
    randomness_of_another_rank, order_of_the_data_starts_anew, moments_by_unsorted_names,
)  # fmt: skip


# Saving beside the training


def killed_in_the_second_save(member: Member, config: Config, folder: Path, rank: int, moment: int) -> None:
    """Save after step 1; die on `rank` in the save after step 2, which goes on while the third step is computed."""
    trainer = world.trainer_of(member, config)
    trainer.train_step()
    with checkpoint.Saver(folder, asynchronous=True) as saver:
        saver.save(trainer)
        trainer.train_step()
        saver.wait()
        if member.rank == rank:
            kills.die_at(moment, folder)
        saver.save(trainer)
        trainer.train_step()


def without_a_copy(member: Member, config: Config, folder: Path) -> None:
    """An asynchronous save that does not copy first, and is slow: the training overwrites what it is to write."""
    from sandbox.checkpoint import saver as module

    trainer = world.trainer_of(member, config)
    trainer.train_step()
    held = module.held
    module.held = lambda trainer, copy: held(trainer, copy=False)
    slow(trainer, folder)


def with_a_copy(member: Member, config: Config, folder: Path) -> None:
    """The same save as it is."""
    trainer = world.trainer_of(member, config)
    trainer.train_step()
    slow(trainer, folder)


def slow(trainer: Trainer, folder: Path) -> None:
    import threading

    from sandbox.checkpoint import saver as module

    write, stepped = module.write, threading.Event()

    def late(*args: Any) -> Any:
        stepped.wait()
        return write(*args)

    module.write = late
    with checkpoint.Saver(folder, asynchronous=True) as saver:
        saver.save(trainer)
        trainer.train_step()
        stepped.set()


def full_disk_on_one_rank(member: Member, config: Config, folder: Path, rank: int, what: str) -> str:
    """What every rank hears of a save for which `rank` has no room, and whether it can go on."""
    trainer = world.trainer_of(member, config)
    trainer.train_step()
    checkpoint.save(trainer, folder)
    trainer.train_step()
    write, heard = getattr(storage._Writer, what), "nothing"

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    if member.rank == rank:
        setattr(storage._Writer, what, full)
    try:
        checkpoint.save(trainer, folder)
    except CheckpointError as error:
        heard = str(error)
    setattr(storage._Writer, what, write)
    trainer.train_step()
    checkpoint.save(trainer, folder)
    return heard


def few_tensors_many_ranks(member: Member, folder: Path) -> None:
    """Most ranks have nothing to write."""
    whole_ = storage.Piece(Layout.whole((3,)), torch.arange(3.0))
    together, partial = Together(), folder / "step-000001.partial"
    if member.rank == 0:
        folders.begin(folder, 1)
    together(lambda: None)
    sums = storage.write(partial, {"parameters/x": whole_}, together)
    if member.rank == 0:
        folders.publish(partial, {"step": 1, "config": {}}, sums)
