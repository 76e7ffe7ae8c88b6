"""What launched ranks do in test_context.py. Imports of pytest stay outside."""

import torch

from sandbox.config import Config
from sandbox.data import Corpus
from sandbox.mesh import Mesh
from sandbox.runtime import Member
from sandbox.trainer import Trainer


def losses(member: Member, config: Config) -> list[float]:
    """On the held-out text, before and between steps; and of the steps, as each rank reports them."""
    mesh = Mesh(config.mesh.degrees, member.rank, "cpu")
    trainer = Trainer(config, mesh, torch.device("cpu"), Corpus.load(config.data, config.model.vocab))
    found = [trainer.validate()]
    for _ in range(2):
        found += [trainer.train_step().loss, trainer.validate()]
    return found
