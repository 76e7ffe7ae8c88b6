"""What the ranks of the ring's benchmark run. In a module of its own, for ranks import it by name."""

import time
from functools import partial
from pathlib import Path

from work import take_turns

from sandbox.runtime import Member

MODEL = {"layers": 4, "width": 64, "heads": 2}


def orders(
    member: Member, orders: list[str], sequence: int, file: Path, rounds: int
) -> tuple[list[list[float]], list[list[float]]]:
    """By order of the columns, each round's seconds, and seconds of processor time of the rank that used most."""
    import torch
    import torch.distributed as dist

    from sandbox.config import Config
    from sandbox.data import Corpus
    from sandbox.mesh import Mesh
    from sandbox.trainer import Trainer

    trainers = []
    for order in orders:
        config = Config.model_validate(
            {
                "mesh": {"cp": {"degree": member.world, "order": order}},
                "model": MODEL,
                "data": {"sequence": sequence, "files": [file]},
                "train": {"batch": 1, "optimizer": "sgd_momentum", "lr": 0.01},
            }
        )
        mesh = Mesh(config.mesh.degrees, member.rank, member.device)
        trainers.append(Trainer(config, mesh, torch.device(member.device), Corpus.load(config.data)))
    used: list[list[float]] = [[] for _ in orders]

    def step(number: int) -> None:
        start = time.process_time()
        trainers[number].train_step()
        used[number].append(time.process_time() - start)

    seconds = take_turns([partial(step, number) for number in range(len(orders))], rounds)
    most = torch.tensor([each[-rounds:] for each in used], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return seconds, most.tolist()
