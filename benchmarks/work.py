"""What the ranks of the benchmarks run. In a module of its own, for ranks import it by name."""

import time
from typing import Any

from sandbox.runtime import Member

MODEL = {"layers": 6, "width": 384, "heads": 6, "hidden": 1024}  # 10.8 M parameters with the embedding and the head
DATA = {"sequence": 128}


def turns(member: Member, kinds: list[tuple[str, dict[str, Any]]], batch: int, rounds: int) -> list[list[float]]:
    """Seconds of each round's step, by trainer."""
    import torch
    import torch.distributed as dist

    from sandbox.config import Config
    from sandbox.data import Corpus
    from sandbox.mesh import Mesh
    from sandbox.trainer import Trainer

    trainers = []
    for engine, axis in kinds:
        config = Config.model_validate(
            {
                "engine": engine,
                "mesh": {"dp": {"degree": member.world, **axis}},
                "model": MODEL,
                "data": DATA,
                "train": {"batch": batch, "optimizer": "sgd_momentum", "lr": 0.01},
            }
        )
        mesh = Mesh(config.mesh.degrees, member.rank, member.device)
        trainers.append(Trainer(config, mesh, torch.device(member.device), Corpus.load(config.data)))
    times: list[list[float]] = [[] for _ in kinds]
    for round_ in range(rounds + 3):
        order = range(len(kinds)) if round_ % 2 else reversed(range(len(kinds)))
        for number in order:
            dist.barrier()
            start = time.perf_counter()
            trainers[number].train_step()
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if round_ >= 3:  # the first ones allocate and rebuild buckets
                times[number].append(took.item())
    return times
