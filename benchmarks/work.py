"""What the ranks of the benchmarks run. In a module of its own, for ranks import it by name."""

import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sandbox.runtime import Member
from sandbox.runtime.member import keep_core

if TYPE_CHECKING:
    from sandbox.trainer import Trainer

MODEL = {"layers": 6, "width": 384, "heads": 6, "hidden": 1024}  # 10.8 M parameters with the embedding and the head
DATA = {"sequence": 128}


class Measured(NamedTuple):
    """Of each round's step: seconds of the slowest rank, and of the processor in the rank that used it most."""

    seconds: list[float]
    processor: list[float]
    collectives: int
    """Of a step, if they are ours."""


def trainer_of(member: Member, sections: dict[str, Any]) -> "Trainer":
    """The trainer of a config, on this rank. Of a config of one process, the first rank's, while the others wait."""
    import torch

    from sandbox.config import Config
    from sandbox.data import Corpus
    from sandbox.mesh import Mesh
    from sandbox.trainer import Trainer

    config = Config.model_validate(sections)
    alone = config.mesh.world == 1
    mesh = Mesh(config.mesh.degrees, 0 if alone else member.rank, None if alone else member.device)
    return Trainer(config, mesh, torch.device(member.device), Corpus.load(config.data))


def race(member: Member, racers: dict[str, dict[str, Any]], common: dict[str, Any], rounds: int) -> dict[str, Measured]:
    """Trainers in the same ranks that take turns, one step each.

    A racer is the sections of a config, besides those that are `common` to all. `core: torch` puts torch's ring
    attention in the place of ours.
    """
    import torch
    import torch.distributed as dist
    from work_ring import torchs_ring

    from sandbox.model import Attention

    trainers = {}
    for name, racer in racers.items():
        sections = {key: value for key, value in racer.items() if key != "core"}
        trainers[name] = trainer = trainer_of(member, {**common, **sections})
        if racer.get("core") == "torch":
            for module in trainer.program.model.modules():
                if isinstance(module, Attention):
                    module.core = torchs_ring(trainer.mesh.axis("cp"))
    used: dict[str, list[float]] = {name: [] for name in trainers}

    def step(name: str) -> None:
        start = time.process_time()
        if trainers[name].mesh.world > 1 or member.rank == 0:
            trainers[name].train_step()
        used[name].append(time.process_time() - start)

    seconds = take_turns([partial(step, name) for name in trainers], rounds)
    most = torch.tensor([each[-rounds:] for each in used.values()], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    counts = [trainer.mesh.recorder.number // max(1, trainer.step) for trainer in trainers.values()]
    return dict(zip(trainers, map(Measured, seconds, most.tolist(), counts), strict=True))


def race_interrupting(member: Member, *job: Any) -> dict[str, Measured]:
    """`race`, where threads interrupt one another as they wake up: Linux's default, and not that of our ranks."""
    each_thread(interrupt)
    return race(member, *job)


def each_thread(schedule: Callable[[int], None]) -> None:
    """Schedule all threads of this process, and so those that they start."""
    for thread in Path("/proc/self/task").iterdir():
        schedule(int(thread.name))


def interrupt(thread: int) -> None:
    """Have a thread interrupt others as it wakes up, as Linux does by default."""
    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def take_turns(steps: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of the slowest rank for each round's call, by step; the first three rounds do not count."""
    import torch
    import torch.distributed as dist

    times: list[list[float]] = [[] for _ in steps]
    for round_ in range(rounds + 3):
        # any order, the same on all ranks: what a step takes depends on the memory that the one before it left
        for number in random.Random(round_).sample(range(len(steps)), len(steps)):
            dist.barrier()
            start = time.perf_counter()
            steps[number]()
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if round_ >= 3:  # those before allocate and rebuild buckets
                times[number].append(took.item())
    return times


def trainer_and_loop(member: Member, batch: int, rounds: int) -> list[list[float]]:
    """The trainer over torch's DDP, and the loop that one would write by hand."""
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from torch.nn.utils import clip_grad_norm_

    from sandbox.model import Transformer, initial, loss_sum

    dp = {"degree": member.world, "strategy": "ddp"}
    common = {"model": MODEL, "data": DATA, "train": {"batch": batch}}
    trainer = trainer_of(member, {"engine": "torch", "mesh": {"dp": dp}, **common})
    config, corpus = trainer.config, trainer.corpus
    plain = Transformer(config.model)
    with torch.no_grad():
        for name, param in plain.named_parameters():
            param.copy_(initial(name, param.shape, config.model, config.train.seed))
    model = DistributedDataParallel(plain, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
    step = 0

    def by_hand() -> float:
        nonlocal step
        whole = corpus.batch(step, seed=0, rows=batch)
        mine = whole.split_rows(member.world)[member.rank]
        optimizer.zero_grad()
        loss = loss_sum(model(mine), mine.targets) * member.world / whole.valid
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        step += 1
        return loss.item()

    return take_turns([trainer.train_step, by_hand], rounds)


def noted_and_not(
    member: Member, strategy: str, batch: int, rounds: int
) -> tuple[list[float], list[float], float, int, float]:
    """Processor time of this rank's steps that note on the board which collectives start, and of those that do not.

    And of one note by itself, how many there are in a step, and of one look at the boards, as under torchrun.
    """
    import torch

    from sandbox.config import Config
    from sandbox.data import Corpus
    from sandbox.mesh import Mesh
    from sandbox.recorder import Recorder
    from sandbox.trainer import Trainer

    dp = {"degree": member.world, "strategy": strategy}
    config = Config.model_validate({"mesh": {"dp": dp}, "model": MODEL, "data": DATA, "train": {"batch": batch}})
    recorder = Recorder(board=member.board)
    mesh = Mesh(config.mesh.degrees, member.rank, member.device, recorder)
    trainer = Trainer(config, mesh, torch.device(member.device), Corpus.load(config.data))
    start, board = member.board.start, type(member.board)
    note = board.start
    count, times = 0, ([], [])  # type: tuple[list[float], list[float]]

    def counted(self: object, *args: object) -> None:
        nonlocal count
        count += 1

    for round_ in range(2 * rounds + 6):
        kind = (round_ + round_ // 2) % 2  # in turn, and each as often first
        if kind:
            count, board.start = 0, counted  # type: ignore[method-assign]
        else:
            board.start = note  # type: ignore[method-assign]
        begun = time.process_time()
        trainer.train_step()
        if round_ >= 6:
            times[kind].append(time.process_time() - begun)
    board.start = note  # type: ignore[method-assign]
    begun = time.process_time()
    for _ in range(10_000):
        start(3, "all_gather", "dp_shard", "float32[1024]")
    return *times, (time.process_time() - begun) / 10_000, count, _look(member)


def _look(member: Member) -> float:
    import torch.distributed as dist

    from sandbox.runtime.watch import Watch

    port = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)] if member.rank == 0 else []
    told = [port[0].port if port else 0]
    dist.broadcast_object_list(told)
    watch = Watch(member, dist.TCPStore("127.0.0.1", told[0], is_master=False), "benchmark", 600)
    begun, looks = time.process_time(), 50
    for _ in range(looks):
        with watch._lock:
            watch._reading = 0.0  # or it would spare itself some
            watch._look()
    took = time.process_time() - begun
    watch.conclude()
    return took / looks


def exchanges_in_turns(member: Member, calls: int, rounds: int) -> list[list[float]]:
    """Small exchanges among ranks whose threads take turns, as they are started, and whose threads do not."""
    import torch

    from sandbox.comm import all_to_all
    from sandbox.mesh import Mesh

    axis = Mesh({"dp": member.world}, member.rank, member.device).axis("dp")
    flat, sizes = torch.ones(4 * member.world), [4] * member.world

    def exchange(schedule: Callable[[int], None]) -> None:
        each_thread(schedule)
        for _ in range(calls):
            all_to_all(flat, sizes, torch.empty_like(flat), sizes, axis).wait()

    return take_turns([partial(exchange, keep_core), partial(exchange, interrupt)], rounds)


def steps_in_turns(member: Member, rows: int, rounds: int) -> list[list[float]]:
    """Steps of fsdp among ranks whose threads take long turns, as they are started, and the kernel's own."""
    dp = {"degree": member.world, "strategy": "fsdp"}
    trainer = trainer_of(
        member, {"mesh": {"dp": dp}, "model": MODEL, "data": DATA, "train": {"batch": rows * member.world}}
    )

    def step(schedule: Callable[[int], None]) -> None:
        each_thread(schedule)
        trainer.train_step()

    return take_turns([partial(step, keep_core), partial(step, partial(keep_core, turn=0))], rounds)
