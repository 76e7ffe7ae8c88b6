"""The sections of a config, and the whole: what is trained, on what, how, and where."""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sandbox.config.base import Count, Fraction, Section, brief, divisors, that_do
from sandbox.config.mesh import Mesh

__all__ = ["Config", "Data", "Model", "Run", "Train"]


class Model(Section):
    """The transformer. `kv_heads` < `heads` is grouped-query attention, 1 is multi-query."""

    layers: Count = 2
    width: Count = 64
    heads: Count = 4
    kv_heads: Count | None = Field(None, description="default: heads")
    hidden: Count | None = Field(None, description="width of the MLP; default: 4 width (gelu), 8/3 width (swiglu)")
    experts: Annotated[int, Field(ge=0)] = Field(0, description="experts in the place of an MLP; 0: none")
    top_k: Count = Field(2, description="experts that a token goes to")
    renormalise: bool = Field(True, description="the gate weights of a token's experts add up to 1")
    moe_every: Count = Field(1, description="of so many layers, the last has experts")
    aux_loss: Annotated[float, Field(ge=0)] = Field(0.01, description="weight of the load-balancing loss")
    z_loss: Annotated[float, Field(ge=0)] = Field(0.001, description="weight of the router's z-loss")
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    bias: bool = Field(False, description="biases in linears, and in norms if they are layer norms")
    tied: bool = Field(False, description="the head shares the embedding's weight")
    rotary: bool = True
    qk_norm: bool = Field(False, description="normalise queries and keys per head")
    dropout: Fraction = 0.0
    vocab: Count = Field(257, description="256 bytes and the end of a document")
    vocab_multiple: Count = Field(1, description="pad the vocabulary to a multiple of this")
    init: Literal["standard", "rough"] = Field(
        "standard", description="rough: biases and norms random as well, so that a wrong one shows"
    )

    @property
    def groups(self) -> int:
        """Number of key/value heads."""
        return self.kv_heads or self.heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLP."""
        return self.hidden or (4 * self.width if self.mlp == "gelu" else 8 * self.width // 3)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding."""
        return math.ceil(self.vocab / self.vocab_multiple) * self.vocab_multiple

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, from 0, has experts in the place of an MLP."""
        return self.experts > 0 and (layer + 1) % self.moe_every == 0

    @model_validator(mode="after")
    def _routes(self) -> Self:
        if not self.experts:
            return self
        if self.top_k > self.experts:
            also = " with model.renormalise: false" if self.experts == 1 and self.renormalise else ""
            raise ValueError(
                f"model.top_k {self.top_k} is more than model.experts {self.experts}. "
                f"Set model.top_k: {self.experts}{also}."
            )
        if self.top_k == 1 and self.renormalise:
            two = ", or model.top_k: 2" if self.experts > 1 else ""
            raise ValueError(
                "model.top_k 1 with model.renormalise makes every gate weight 1, and the router has no gradient of the "
                f"loss. Set model.renormalise: false{two}."
            )
        if self.moe_every > self.layers:
            raise ValueError(
                f"model.moe_every {self.moe_every} is more than model.layers {self.layers}: no layer has experts. "
                f"Set model.moe_every: {self.layers}."
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        step, groups = (2 if self.rotary else 1), self.kv_heads or 1  # rotary turns pairs of features
        fit = [n for n in range(groups, min(self.width, 10_000) + 1, groups) if self.width % (n * step) == 0]
        near = max(1, round(self.width / self.heads / step)) * step * self.heads
        if self.width % self.heads:
            fixes = [that_do(fit)] if fit else []
            if self.heads % groups == 0 or not fit:
                fixes.append(f"{'Or set' if fit else 'Set'} model.width: {near}.")
            raise ValueError(f"model.heads {self.heads} does not divide model.width {self.width}. {' '.join(fixes)}")
        if self.heads % self.groups:
            raise ValueError(
                f"model.kv_heads {self.groups} does not divide model.heads {self.heads}. {divisors(self.heads)}"
            )
        if self.rotary and (self.width // self.heads) % 2:
            fix = f", or model.heads: {' or '.join(map(str, fit))}" if fit else ""
            raise ValueError(
                f"model.rotary needs an even head width, but model.width / model.heads = {self.width // self.heads}. "
                f"Set model.rotary: false, or model.width: {near}{fix}."
            )
        return self


class Data(Section):
    """The text. Bytes are tokens; CPython's own documentation is the default corpus."""

    files: tuple[Path, ...] = Field((), description="text files, one document each; default: pydoc_data.topics")
    sequence: Count = 64
    layout: Literal["packed", "padded"] = Field(
        "packed", description="packed: rows are full and may hold several documents; padded: one document a row"
    )
    mask: Literal["none", "ragged"] = Field(
        "none", description="ragged: hide targets unevenly, whole rows too, so that a mean of means shows"
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="fraction kept for validation")


class Train(Section):
    """The optimisation. `batch` counts rows of the whole step, over all ranks and microbatches."""

    seed: Annotated[int, Field(ge=0)] = 0
    steps: Count = 100
    batch: Count = 16
    microbatches: Count = Field(1, description="backward passes a step, on each rank (gradient accumulation)")
    optimizer: Literal["sgd", "sgd_momentum", "adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 3e-3
    momentum: Fraction = 0.9
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="largest global gradient norm; null: no clipping"
    )
    dtype: Literal["float64", "float32", "bfloat16"] = Field(
        "float32", description="bfloat16: float32 parameters and reductions, bfloat16 compute"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="what backward computes again instead of keeping: attention (selective), or blocks (full)"
    )
    eval_every: Annotated[int, Field(ge=0)] = Field(0, description="steps between validations; 0: only at the end")
    eval_batches: Count = 4


class Run(Section):
    """Where and how long."""

    folder: Path | None = Field(None, description="for metrics, checkpoints and the report; default: runs/NAME")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout: Annotated[float, Field(gt=0)] = Field(
        60.0, description="seconds without an answer until a hang is reported"
    )
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(0, description="steps between checkpoints; 0: none")
    checkpoint_async: bool = Field(True, description="write checkpoints while the training goes on")
    checkpoint_keep: Count = Field(2, description="the newest so many stay")

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.folder and (self.folder.is_absolute() or ".." in self.folder.parts):
            raise ValueError(
                f"run.folder {self.folder} leads out of where the run is started. A config may name a folder inside; "
                "name any other with --folder."
            )
        return self


class Config(Section):
    """A whole run."""

    name: str = "run"
    engine: str = "native"
    mesh: Mesh = Mesh()
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    run: Run = Run()

    def reference(self) -> "Config":
        """The same training on one rank, with an empty plan, all kept: what sharded runs are held against."""
        train = self.train.model_copy(update={"recompute": "none"})
        return self.model_copy(update={"engine": "native", "mesh": Mesh(), "train": train})

    @property
    def passes(self) -> int:
        """Backward passes a step, as the data axis sees them: a pipeline runs all microbatches as one."""
        return 1 if self.mesh.pp.degree > 1 else self.train.microbatches

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.name == ".." or set(self.name) & set("/\\") or not self.name.isprintable() or len(self.name) > 200:
            raise ValueError(f"name {brief(self.name)} cannot be that of a folder. Use letters and digits.")
        ranks, passes, batch = self.mesh.dp.degree, self.train.microbatches, self.train.batch
        if batch < ranks * passes:
            fewer = f", or train.microbatches: {batch // ranks}" if batch >= ranks else ""
            raise ValueError(
                f"train.batch {batch} leaves a rank without a row: mesh.dp.degree {ranks} x train.microbatches "
                f"{passes} need at least {ranks * passes}. Set train.batch: {ranks * passes}{fewer}."
            )
        return self
