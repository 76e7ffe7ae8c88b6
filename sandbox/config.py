"""A run as data: what is trained, on what, how, and on which mesh. Checked before anything starts.

A config is a YAML file of five sections (`engine`, `mesh`, `model`, `data`, `train`, and `run` for where and how
long). What is left out has a default. Unknown keys are refused with the nearest right name.
"""

import difflib
import math
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sandbox.errors import ConfigError

__all__ = ["AXES", "Axis", "Config", "Data", "DataAxis", "Mesh", "Model", "Options", "Run", "Train", "check", "load"]

AXES = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")
"""Axes of the device mesh, outermost first: the innermost talks most, so its ranks are neighbours.

`ep` is carved out of the data ranks: all of dp_replicate x dp_shard x ep see other rows.
"""

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
S = TypeVar("S", bound=BaseModel)

_brief = reprlib.Repr()  # of what a file may hold: lists of lists of lists
_brief.maxlevel, _brief.maxstring, _brief.maxother = 2, 80, 80

_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What the parser says: also of a 13th month or a number of 5000 digits, and of 1000 brackets in one another."""


class Section(BaseModel):
    """A part of a config: frozen, unknown keys refused, and numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Options(Section):
    """Base of a strategy's own options; they stand beside `degree` and `strategy` in the axis' section."""


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
            raise ValueError(
                f"model.top_k {self.top_k} is more than model.experts {self.experts}. Set model.top_k: {self.experts}."
            )
        if self.top_k == 1 and self.renormalise:
            raise ValueError(
                "model.top_k 1 with model.renormalise makes every gate weight 1, and the router has no gradient of the "
                "loss. Set model.renormalise: false, or model.top_k: 2."
            )
        if self.moe_every > self.layers:
            raise ValueError(
                f"model.moe_every {self.moe_every} is more than model.layers {self.layers}: no layer has experts. "
                f"Set model.moe_every: {self.layers}."
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"model.heads {self.heads} does not divide model.width {self.width}. {_near(self.width)}")
        if self.heads % self.groups:
            raise ValueError(
                f"model.kv_heads {self.groups} does not divide model.heads {self.heads}. {_near(self.heads)}"
            )
        if self.rotary and (self.width // self.heads) % 2:
            even = "" if self.width % 2 else f"model.heads to a divisor of {self.width // 2}, or "
            raise ValueError(
                f"model.rotary needs an even head width, but model.width / model.heads = {self.width // self.heads}. "
                f"Set {even}model.rotary: false."
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


class Axis(BaseModel):
    """One axis of the mesh. Other keys are the strategy's options, checked by the strategy itself."""

    model_config = ConfigDict(extra="allow", frozen=True)

    degree: Count = 1
    strategy: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What is left for the strategy."""
        return dict(self.model_extra or {})


class DataAxis(Axis):
    """The data axis. `replicas` > 1 shards within groups of degree / replicas and replicates over them (HSDP)."""

    strategy: str = "ddp"
    replicas: Count = 1


class Mesh(Section):
    """Axis -> degree, strategy, options. Axes that are left out have degree 1."""

    pp: Axis = Axis()
    dp: DataAxis = DataAxis()
    ep: Axis = Axis()
    cp: Axis = Axis()
    tp: Axis = Axis()

    @property
    def degrees(self) -> dict[str, int]:
        """Size of every axis of the device mesh, outermost first."""
        replicate, ep = self.dp.replicas, self.ep.degree
        shard = self.dp.degree // replicate // ep
        return dict(zip(AXES, (self.pp.degree, replicate, shard, ep, self.cp.degree, self.tp.degree), strict=True))

    @property
    def world(self) -> int:
        """Number of ranks."""
        return math.prod(self.degrees.values())

    def __str__(self) -> str:
        """Short form for tables: `dp 4`, `dp 2x2`, `-` on one rank."""
        parts = [
            f"{name} {axis.degree}" for name in ("pp", "ep", "cp", "tp") if (axis := getattr(self, name)).degree > 1
        ]
        if self.dp.degree > 1:
            split = (
                f"{self.dp.replicas}x{self.dp.degree // self.dp.replicas}" if self.dp.replicas > 1 else self.dp.degree
            )
            parts.insert(int(self.pp.degree > 1), f"dp {split}")
        return ", ".join(parts) or "-"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dp.degree % self.dp.replicas:
            raise ValueError(
                f"mesh.dp.replicas {self.dp.replicas} does not divide mesh.dp.degree {self.dp.degree}. "
                f"{_near(self.dp.degree)}"
            )
        if (ranks := self.dp.degree // self.dp.replicas) % self.ep.degree:
            of = "mesh.dp.degree" + (" / mesh.dp.replicas" if self.dp.replicas > 1 else "")
            raise ValueError(
                f"mesh.ep.degree {self.ep.degree} does not divide {of} {ranks}: experts are cut over data ranks. "
                f"{_near(ranks)}"
            )
        return self


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
            raise ValueError(f"name {_brief.repr(self.name)} cannot be that of a folder. Use letters and digits.")
        least = self.mesh.dp.degree * self.train.microbatches
        if self.train.batch < least:
            raise ValueError(
                f"train.batch {self.train.batch} leaves a rank without a row: mesh.dp.degree {self.mesh.dp.degree} x "
                f"train.microbatches {self.train.microbatches} need at least {least}. Set train.batch: {least}."
            )
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config at `path` and apply `KEY=VALUE` overrides, such as `mesh.dp.degree=4`.

    Raises ConfigError: no such file, not YAML, an unknown key, a value of the wrong kind, or settings at odds.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.4)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).{hint}") from None
    try:
        tree = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not sections such as `mesh:` and `train:`.")
    for item in overrides:
        _override(tree, item)
    tree.setdefault("name", path.stem)
    return check(Config, tree, source=str(path))


def check(kind: type[S], values: dict[str, Any], *, source: str = "", prefix: str = "", also: Iterable[str] = ()) -> S:
    """Validate `values` as `kind`; on failure raise a ConfigError that names the field's path and the fix.

    `prefix` is the path of `values` in the config, `also` further names that are right at this place.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(kind, dict(item), prefix, also) for item in error.errors(include_url=False)]
    where = f"{source}: " if source else ""
    raise ConfigError("\n".join(where + problem for problem in dict.fromkeys(problems)))


def _override(tree: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not last:
        raise ConfigError(f"--set {item}: write KEY=VALUE, such as mesh.dp.degree=4.")
    try:
        value = yaml.safe_load(text)
    except _NOT_YAML:
        raise ConfigError(f"--set {item}: the value is not YAML. Quote it.") from None
    for depth, part in enumerate(path):
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {item}: {'.'.join(path[: depth + 1])} is a value, not a section.")
        tree = child
    tree[last] = value


def _problem(kind: type[BaseModel], item: dict[str, Any], prefix: str, also: Iterable[str]) -> str:
    """One line about one pydantic error."""
    parts = [prefix, *(str(part) for part in item["loc"])]
    path = ".".join(part for part in parts if part)
    if item["type"] == "extra_forbidden":
        *parents, name = (str(part) for part in item["loc"])
        right = [*_fields(kind, parents), *(also if not parents else ())]
        near = difflib.get_close_matches(name, right, 1, 0.5)
        stem = path.removesuffix(name)
        hint = f"Did you mean {stem}{near[0]}?" if near else f"It may be one of: {', '.join(sorted(right)) or 'none'}."
        return f"{path} is not a field. {hint}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "literal_error":
        return f"{path}: {_brief.repr(item['input'])} is not one of {item['ctx']['expected']}."
    message = str(item["msg"]).removeprefix("Input ")
    return f"{path}: {_brief.repr(item['input'])} {message[0].lower()}{message[1:]}."


def _fields(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = kind.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        kind = field.annotation
    return list(kind.model_fields)


def _near(total: int) -> str:
    """The settings that would work."""
    small = [n for n in range(1, min(total, 10_000) + 1) if total % n == 0]
    return f"Those that do: {', '.join(map(str, small[:20]))}{', ...' if len(small) > 20 or total > 10_000 else ''}."
