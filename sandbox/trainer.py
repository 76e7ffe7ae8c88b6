"""The only training loop. It knows steps, not strategies: whatever the plan, these lines run."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sandbox.batch import Batch
from sandbox.comm import all_reduce
from sandbox.config import Config
from sandbox.data import Corpus
from sandbox.errors import TrainingError
from sandbox.mesh import Mesh
from sandbox.plan import fold
from sandbox.program import Program, learning_rate

__all__ = ["Step", "Trainer"]


@dataclass(frozen=True)
class Step:
    """What one step did. Losses in nats a token, over all ranks; the norm is that of the gradient before clipping."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    seconds: float


class Trainer:
    """A training on this rank: `for step in trainer.run()`, or `compute_gradients` and `update` by hand.

    `start`: what the plan is folded over, if it is not the config's model.
    """

    def __init__(
        self, config: Config, mesh: Mesh, device: torch.device, corpus: Corpus, start: Program | None = None
    ) -> None:
        self.config, self.mesh, self.device, self.corpus = config, mesh, device, corpus
        self.program = fold(config, mesh, device, start)
        self.optimizer = self.program.make_optimizer(self.program)
        self.step = 0
        for name, param in self.program.model.named_parameters():
            param.register_post_accumulate_grad_hook(lambda _, name=name: self._accumulated(name))

    def run(self) -> Iterator[Step]:
        """Train to the last step."""
        while self.step < self.config.train.steps:
            yield self.train_step()

    def train_step(self) -> Step:
        """One step of the optimizer."""
        started = time.perf_counter()
        batch = self.batch()
        local = self.compute_gradients(batch)
        loss = all_reduce(local, self.mesh.axis("pp", "dp_replicate", "dp_shard", "ep", "cp"), "loss")
        norm = self.update()
        seconds = time.perf_counter() - started
        lr = self.optimizer.param_groups[0]["lr"]
        return Step(self.step, loss.wait().item(), norm.item(), lr, batch.tokens.numel() / seconds, seconds)

    def batch(self) -> Batch:
        """The global batch of the coming step: the same on all ranks.

        Raises TrainingError: it holds a token that the model has no row for.
        """
        batch = self.corpus.batch(self.step, seed=self.config.train.seed, rows=self.config.train.batch)
        low, high, vocab = int(batch.tokens.min()), int(batch.tokens.max()), self.config.model.vocab
        if low < 0 or high >= vocab:
            raise TrainingError(
                f"step {self.step + 1}: the batch holds token {low if low < 0 else high}, but the model's are 0 to "
                f"{vocab - 1}. Mend the text, or raise model.vocab."
            )
        return batch

    def compute_gradients(self, batch: Batch) -> Tensor:
        """Forward and backward over this rank's microbatches -> this rank's share of the loss (float64)."""
        self.program.model.train()
        self.zero_grad()
        local = self.program.shard_batch(batch).to(self.device)
        microbatches = local.split_rows(self.config.train.microbatches)
        loss = self.program.forward_backward(self.program, microbatches, max(1, batch.valid))
        for param in self.program.parameters.values():
            if param.grad is None:  # unused in this step: zero, so that its decay depends on no layout
                param.grad = torch.zeros_like(param)
        return loss

    def zero_grad(self) -> None:
        """Let go of all gradients: of the model, and of what the optimizer updates, down to the empty pieces.

        (A piece's gradient is a view, and an empty one too keeps alive the whole that it is a view of.)
        """
        for param in (*self.program.model.parameters(), *self.program.parameters.values()):
            param.grad = None

    def update(self) -> Tensor:
        """Clip and step -> the gradient's norm before clipping (float64)."""
        norm = self.program.clip(self.program, self.config.train.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.train, self.step)
        self.optimizer.step()
        self.program.refresh()
        self.step += 1
        return norm

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the held-out batches, in nats a token."""
        self.program.model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for batch in self.corpus.held_out_batches(self.config.train.eval_batches, rows=self.config.train.batch):
            local = self.program.shard_batch(batch).to(self.device)
            loss = self.program.evaluate(self.program, local)
            valid = local.valid if self.mesh.axis("pp").rank == 0 else 0  # once, of the ranks that see the same rows
            total += torch.tensor([loss.item(), valid], dtype=torch.float64)
        everyone = self.mesh.axis("pp", "dp_replicate", "dp_shard", "ep", "cp")
        summed, count = all_reduce(total, everyone, "loss").wait().tolist()
        return float(summed / max(1.0, count))

    def _accumulated(self, name: str) -> None:
        if self.program.complete(name):
            self.program.grad_ready(name)
