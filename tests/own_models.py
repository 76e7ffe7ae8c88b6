"""Models that somebody might bring along, and their losses. Ranks import this, so imports of pytest stay outside."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class Vision(nn.Module):
    """An MLP over pictures, with a norm, biases, and sizes that do not divide."""

    def __init__(self, width: int = 15, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(7 * 7, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.last = nn.Linear(width, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.first(pictures.flatten(1))
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


def pictures(rows: int = 11) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"pixels": torch.randn(rows, 1, 7, 7), "labels": torch.randint(10, (rows,))}


def classify(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    scores = model(batch["pixels"])
    return F.cross_entropy(scores, batch["labels"], reduction="sum"), len(scores)


# Bugs


def mean_of_own_rows(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    return F.cross_entropy(model(batch["pixels"]), batch["labels"]), 1


def mean_counted_well(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    return F.cross_entropy(model(batch["pixels"]), batch["labels"]), len(batch["labels"])


def for_each_rank(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    loss, count = classify(model, batch)
    return loss * (dist.get_world_size() if dist.is_initialized() else 1), count


def scaled_on_one_rank(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    loss, count = classify(model, batch)
    return loss * (1.5 if dist.is_initialized() and dist.get_rank() else 1), count


def no_count(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return classify(model, batch)[0]


class Counting(Vision):
    """Keeps a running mean of what it sees, each rank its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(15))

    def forward(self, pictures: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(self.first(pictures.flatten(1)).mean(0), 0.1)
        return super().forward(pictures)


class Leaking(Vision):
    """Remembers in a plain attribute how often a rank of several was run, and lets it count from the second step on."""

    runs = 0

    def forward(self, pictures: Tensor) -> Tensor:
        self.runs += dist.is_initialized()
        return super().forward(pictures * (1.1 if self.runs > 2 else 1.0))


class Normalised(Vision):
    """Normalises over the rows that it happens to see."""

    def forward(self, pictures: Tensor) -> Tensor:
        return super().forward(pictures - pictures.mean(0, keepdim=True))


class Contrasting(Vision):
    """As many rows as there are change the gradient, but not the loss."""

    def forward(self, pictures: Tensor) -> Tensor:
        scores = super().forward(pictures)
        return scores + (len(pictures) - 1) * (scores - scores.detach())


class Random(Vision):
    def forward(self, pictures: Tensor) -> Tensor:
        return super().forward(F.dropout(pictures, 0.5))


class Frozen(Vision):
    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(requires_grad=False)


class Entangled(Vision):
    """Two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1][1].weight = self.layers[0][1].weight


class Inner(nn.Module):
    """A norm over features in groups, which tensor parallelism cuts between groups."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(49, 16), nn.LayerNorm(4), nn.Linear(16, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.up(pictures.flatten(1))
        return self.down(self.norm(x.unflatten(-1, (-1, 4))).flatten(-2))


def llama(**options: Any) -> nn.Module:
    """Hugging Face's Llama with random weights, small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 34, "num_hidden_layers": 2, "vocab_size": 38}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | {"use_cache": False} | options)))


def text(rows: int = 7, columns: int = 12) -> dict[str, Tensor]:
    """Rows with other numbers of targets; one has none."""
    torch.manual_seed(2)
    tokens = torch.randint(38, (rows, columns))
    hidden = torch.rand(rows, columns) < torch.linspace(0, 1, rows)[:, None]
    return {"input_ids": tokens, "labels": tokens.roll(-1, 1).masked_fill(hidden, -100)}


def predict_next(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, int]:
    scores, targets = model(input_ids=batch["input_ids"], **options).logits, batch["labels"]
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum"), int((targets != -100).sum())


def predict_next_at(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """With positions, for a model that sees a part of the columns would number them anew."""
    rows, columns = batch["input_ids"].shape
    return predict_next(model, batch, position_ids=torch.arange(columns).expand(rows, -1))
