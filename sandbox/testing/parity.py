"""The assertion: rows checked for independence, a training put together that hides nothing, and the verifier's word."""

import functools
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sandbox.config import Config, Mesh, Model, Run, Train, check
from sandbox.errors import ConfigError, ParityError, UnsupportedError, WorkerError
from sandbox.plan import plan as strategies
from sandbox.report import tables
from sandbox.runtime import Member, launch, warm
from sandbox.testing.own import LossFn, OwnModel
from sandbox.verdict import Verdict, Verdicts
from sandbox.verify import Case, Verifier

__all__ = ["Survey", "assert_parity", "survey"]

ROUNDING = 1e-11
"""What another order of summation may change in float64."""


def assert_parity(
    build_model: Callable[[], nn.Module],
    loss_fn: LossFn,
    batch: Any,
    *,
    plan: str | Mapping[str, Any] = "ddp",
    engine: str = "native",
    ranks: int = 2,
    microbatches: int = 2,
    blocks: str | Sequence[str] | None = None,
    modules: Mapping[str, str] | None = None,
    dtype: str = "float64",
    seed: int = 0,
    timeout: float = 60.0,
) -> Verdict:
    """Hold three steps of a model's sharded training against the same training in one process.

    Compared are all elements of every gradient, the norm before clipping (which halves it), parameters and buffers
    after each step of SGD with momentum, the loss, and what ranks hold that should hold the same. In float64 1e-12 is
    allowed, and the whole model computes in float64; in float32, four times what another order of summation changes.

    Args:
        build_model: makes the model. Called on each rank, after `torch.manual_seed(seed)`.
        loss_fn: `(model, batch)` -> (the sum of the losses, a tensor; how many there are). The step's loss is the sum
            over all ranks' rows divided by the number over all, so return no mean.
        batch: tensors in any nesting of dicts, lists and tuples; row i of each belongs together.
        plan: a strategy of the data axis (`zero2`), or a config's section `mesh`:
            `{"dp": {"degree": 2, "strategy": "fsdp", "reshard_after_forward": False}, "tp": {"degree": 2}}`.
        engine: whose implementation, see `sandbox list`.
        ranks: how many, if `plan` is a name.
        microbatches: backward passes a step, on each rank.
        blocks: names of modules that zero3 and fsdp gather one by one, patterns as in a shell; by default, the
            children of each outermost `nn.ModuleList`. What lies in none is gathered once for forward and backward.
        modules: name or pattern -> how tensor parallelism cuts that module, see `sandbox.testing.modules`.
        dtype: float64 or float32.
        seed: of the initial values.
        timeout: seconds without an answer until a hang is reported.

    Raises:
        ParityError: they differ; an AssertionError whose text has the table, the worst tensors and the likely cause.
        ConfigError, UnsupportedError: an argument is wrong, or the engine cannot run that here.
        WorkerError: a rank failed.

    """
    names = (blocks,) if isinstance(blocks, str) else blocks
    own = OwnModel(
        build_model, loss_fn, batch, None if names is None else tuple(names), tuple((modules or {}).items()),
        _dtype(dtype), seed,
    )  # fmt: skip
    mesh = check(
        Mesh, {"dp": {"degree": ranks, "strategy": plan}} if isinstance(plan, str) else dict(plan), prefix="plan"
    )
    _fits(own, mesh)
    train = {
        "steps": 3, "batch": own.rows, "microbatches": microbatches, "optimizer": "sgd_momentum", "schedule": "linear",
        "weight_decay": 0.1, "dtype": dtype,
    }  # fmt: skip
    settings = {
        "engine": engine, "mesh": mesh, "run": Run(timeout=timeout), "model": Model(heads=4 * mesh.tp.degree),
        "train": check(Train, train, prefix="train"),
    }  # fmt: skip
    config = check(Config, settings)
    strategies(config)
    about = _surveyed(_sendable(own), timeout)
    if about.library:
        warm(about.library)  # once, instead of in every rank
    tuned = config.train.model_copy(update={"clip": about.norm / 2 or None, "lr": about.rate})
    config = config.model_copy(update={"name": about.name, "train": tuned})
    verdict = _verifier().verify(Case(config, subject=replace(own, counts=about.counts)))
    if verdict.status == "unsupported":
        raise UnsupportedError(verdict.cause)
    if verdict.status == "failed":
        raise WorkerError(verdict.cause)
    if verdict.status == "mismatch":
        page = io.StringIO()
        tables.show(Verdicts(cases=[verdict], seconds=verdict.seconds), Console(file=page, width=160))
        raise ParityError("\n" + "\n".join(line.rstrip() for line in page.getvalue().splitlines()), verdict)
    return verdict


@dataclass(frozen=True)
class Survey:
    """What is known of a model before anything is sharded."""

    name: str
    library: str  # the module of the model's class, if it is installed rather than of the caller's own package
    counts: tuple[int, ...]  # losses of each row
    norm: float  # of the first gradient
    rate: float  # that moves parameters by about a hundredth of their size


def survey(member: Member, own: OwnModel) -> Survey:
    """Run the batch whole and row by row, in float64. Raises ParityError: rows matter to one another.

    Then no cut keeps the gradients; and the reference's own noise, which other sums of it show, would excuse anything.
    """
    every = torch.arange(own.rows)
    model = own.model()
    frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
    if frozen:
        raise ConfigError(f"build_model: {frozen[0]} does not require a gradient. Make it a buffer, or let it train.")
    loss, count, whole = _backward(own, model, [every])
    twin = own.model()
    torch.manual_seed(own.seed + 1)
    if _backward(own, twin, [every])[0] != loss:
        raise ParityError("loss_fn: the same model and rows give another loss. Does it draw random numbers (dropout)?")
    added, counted, parts = _backward(own, own.model(), list(every.split(1)))
    if sum(count) != sum(counted):
        raise ParityError(
            f"loss_fn: it counts {sum(count)} losses in the whole batch and {sum(counted)} in its rows, one by one. "
            "The number is added up over ranks and microbatches: count what the sum of losses sums up."
        )
    if not abs(added - loss) <= ROUNDING * abs(loss):
        raise ParityError(
            f"loss_fn: the loss of the whole batch is {loss:.6g}, those of its rows add up to {added:.6g} "
            f"({added / loss if loss else float('inf'):.4f} times). Return the sum of the losses and their number; a "
            "mean over a rank's own rows makes the step's loss a mean of means."
        )
    for name, grad in whole.items():
        if not (parts[name] - grad).abs().max() <= ROUNDING * max(grad.abs().max().item(), 1e-3 * _norm(whole)):
            raise ParityError(
                f"loss_fn: the gradient of {name} from the whole batch is not the sum of those from its rows. Does "
                "something see several rows at once (batch normalisation, a contrastive loss) or keep a state?"
            )
    norm = _norm(whole) / max(1, sum(count))
    size = _norm({name: p.detach() for name, p in model.named_parameters()})
    home, caller = type(model).__module__, own.build_model.__module__
    library = home if home.partition(".")[0] not in (caller.partition(".")[0], "torch") else ""
    return Survey(type(model).__name__, library, tuple(counted), norm, 0.02 * size / norm if norm and size else 0.01)


def _backward(own: OwnModel, model: nn.Module, parts: Sequence[Tensor]) -> tuple[float, list[int], dict[str, Tensor]]:
    """Loss, counts by part and gradients of parts of the batch, one after the other."""
    total, counts = 0.0, []
    for part in parts:
        loss, count = own.loss(model, own.take(part))
        loss.backward()
        total += loss.item()
        counts.append(count)
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return total, counts, grads


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(sum(t.double().square().sum().item() for t in tensors.values()) ** 0.5)


def _fits(own: OwnModel, mesh: Mesh) -> None:
    """See that the arguments fit one another, before anything starts."""
    tensors = [t for t in tree_leaves(own.data) if isinstance(t, Tensor)]
    sizes = sorted({len(t) if t.dim() else 0 for t in tensors})
    if len(sizes) != 1 or not sizes[0]:
        raise ConfigError(f"batch: its tensors have {sizes or 'no'} rows. Give all as many, along dimension 0.")
    if max(mesh.pp.degree, mesh.cp.degree, mesh.ep.degree) > 1:
        raise ConfigError("plan: a model of your own runs along dp and tp. Leave out pp, cp and ep.")
    if (mesh.tp.degree > 1) != bool(own.modules):
        raise ConfigError(
            "modules: say how tensor parallelism cuts them, such as {'*.up': 'column', '*.down': 'row'}."
            if mesh.tp.degree > 1
            else "modules: they are for tensor parallelism. Add tp to the plan: {'tp': {'degree': 2}}."
        )


def _dtype(name: str) -> torch.dtype:
    if name not in ("float64", "float32"):
        raise ConfigError(f"dtype: {name!r} is not one of 'float64', 'float32'.")
    return torch.float64 if name == "float64" else torch.float32


def _sendable(own: OwnModel) -> bytes:
    """The subject as ranks will read it."""
    for what in ("build_model", "loss_fn"):
        function = getattr(own, what)
        try:
            pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError):
            raise ConfigError(
                f"{what}: it cannot be sent to the ranks. Write it as a function at the top of a module (not a lambda, "
                "not inside a function); functools.partial of one is fine."
            ) from None
        if getattr(function, "__module__", "") == "__main__":
            raise ConfigError(f"{what}: ranks cannot import __main__. Put it in a module, or run this by pytest.")
    return pickle.dumps(own)


@functools.lru_cache(maxsize=64)
def _surveyed(own: bytes, timeout: float) -> Survey:
    return launch(1, survey, replace(pickle.loads(own), dtype=torch.float64), timeout=timeout)[0]


@functools.cache
def _verifier() -> Verifier:
    return Verifier()
