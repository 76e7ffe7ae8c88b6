"""Sharded run against reference: the judgement.

A case is run by its own world of ranks, each of which takes down what it did (capture.py). Put together, that is held
against the unsharded run (reference.py): rows, losses, every element of gradients and parameters, norms, bytes. What
differs by more than the tolerance is a mismatch, and its pattern names the cause (diagnose.py).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

from torch import Tensor

from sandbox.config import Config
from sandbox.errors import SandboxError, UnsupportedError
from sandbox.measure import fill
from sandbox.plan import get_ready, name_of, preload
from sandbox.runtime import launch, warm
from sandbox.trainer import Trainer
from sandbox.verdict import Amount, Difference, Verdict
from sandbox.verify.capture import Capture, Subject, capture
from sandbox.verify.compare import Whole, assemble, differences
from sandbox.verify.diagnose import Findings, diagnose
from sandbox.verify.reference import Reference, References, World
from sandbox.verify.rows import misdealt, misweighted

__all__ = ["Case", "Verifier", "fixture"]


@dataclass(frozen=True)
class Case:
    """A config to verify. `prepare` tampers with each rank's trainer before it starts (a function that pickles).

    A `subject` takes the place of the config's model and corpus. What it sends and holds is not predicted.
    """

    config: Config
    prepare: Callable[[Trainer], Any] | None = None
    subject: Subject | None = None


def fixture(config: Config, dtype: str | None = "float64", optimizer: str = "sgd_momentum") -> Config:
    """The training that shows what `config` computes: its model, mesh and batch, with nothing left that hides a bug.

    Three steps of SGD with momentum, for Adam hides a wrong scale; a learning rate that changes; ragged masks with
    whole rows hidden; biases and norms away from 0 and 1. `dtype` None keeps the config's own. The
    parameters of `optimizer` adamw are reported, not judged.
    """
    train = {
        "steps": 3, "optimizer": optimizer, "lr": 0.05, "weight_decay": 0.1, "schedule": "linear", "warmup": 0,
        "dtype": dtype or config.train.dtype,
    }  # fmt: skip
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "data": config.data.model_copy(update={"mask": "ragged"}),
            "model": config.model.model_copy(update={"init": "rough"}),
        }
    )


class Verifier:
    """Verifies cases. `world` runs the work of each rank of a world; the default launches ranks here.

    `measure`: peak memory and a timeline too, for which two of the three steps take longer.
    """

    def __init__(self, world: World | None = None, *, measure: bool = False) -> None:
        self._world, self._measure = world or launch, measure
        self.references = References(self._world)

    def verify_all(self, cases: Iterable[Case]) -> Iterator[Verdict]:
        """Verdicts in the order of the cases. Two are under way at a time: one computes, one starts or is judged."""
        pool = ThreadPoolExecutor(2)
        try:
            yield from pool.map(self.verify, cases)
        finally:
            pool.shutdown(cancel_futures=True)

    def verify(self, case: Case) -> Verdict:
        """Hold one case against its reference. Never raises for what the case itself does wrong."""
        config, started = case.config, time.perf_counter()
        verdict = Verdict(
            name=config.name,
            engine=config.engine,
            strategy=config.mesh.dp.strategy,
            mesh=str(config.mesh),
            dtype=config.train.dtype,
            world=config.mesh.world,
            status="held",
            config=config.model_dump(mode="json"),
        )
        try:
            verdict.strategy = name_of(config)
            get_ready(config)
            warm(*preload(config.engine))
            reference = self.references.of(config, case.subject)
            started = time.perf_counter()
            work = config, case.prepare, case.subject, self._measure
            ranks = self._world(config.mesh.world, capture, *work, timeout=config.run.timeout)
            self._judge(verdict, case, reference, ranks)
        except UnsupportedError as error:
            verdict.status, verdict.cause = "unsupported", str(error)
        except SandboxError as error:
            verdict.status, verdict.cause = "failed", str(error)
        verdict.seconds = time.perf_counter() - started
        return verdict

    def _judge(self, verdict: Verdict, case: Case, reference: Reference, ranks: list[Capture]) -> None:
        # AdamW divides by a gradient's size, and so makes a step of noise: nothing after its first is judged
        config, judged = case.config, (1 if case.config.train.optimizer == "adamw" else case.config.train.steps)
        steps = range(judged)

        def compared(
            found: Sequence[Mapping[str, Whole]],
            expected: Sequence[Mapping[str, Tensor]],
            floors: Iterable[Mapping[str, float]] = repeat({}),
        ) -> list[list[Difference]]:
            return [differences(*step) for step in zip(found, expected, floors, strict=False)]

        wholes = assemble([[*rank.gradients, *rank.parameters] for rank in ranks])
        parameters = compared(wholes[config.train.steps :], reference.parameters)
        losses = [sum(rank.losses[step] for rank in ranks if not rank.place["tp"]) for step in steps]
        expected = reference.run.losses[:judged]
        found = Findings(
            config=config,
            tolerance=reference.tolerance,
            losses=[abs(a - b) / max(abs(b), 1e-300) for a, b in zip(losses, expected, strict=True)],
            norms=[_furthest([_ratio(r.norms[s], reference.run.norms[s]) for r in ranks]) for s in steps],
            rates=[_furthest([r.rates[s] / reference.run.rates[s] for r in ranks]) for s in steps],
            gradients=compared(wholes[:judged], reference.gradients, reference.floors),
            parameters=parameters if judged == config.train.steps else parameters[:1],
            buffers=compared(assemble([rank.buffers for rank in ranks])[:judged], reference.buffers),
            rows=misdealt(ranks, reference.run),
            weights=misweighted(ranks, reference.rows, config),
            amounts="",
        )
        fill(verdict, config, ranks, theory=case.subject is None)
        found = replace(found, amounts=_unexpected(verdict.traffic, "sent") or _unexpected(verdict.memory, "held"))
        verdict.tolerance = found.tolerance
        verdict.losses, verdict.reference_losses = losses, expected
        verdict.loss, verdict.norm = _largest(found.losses), _largest([abs(ratio - 1) for ratio in found.norms])
        verdict.gradients = _worst(found.gradients)
        verdict.parameters, verdict.reported = (
            (list(parameters[-1]), []) if judged == config.train.steps else ([], list(parameters[-1]))
        )
        good = (
            _largest([verdict.loss, verdict.norm]) <= found.tolerance
            and not any(found.wrong(step) for step in (*found.gradients, *found.parameters, *found.buffers))
            and not found.rows
            and not found.amounts
        )
        if not good:
            verdict.status, verdict.cause = "mismatch", diagnose(found)


def _largest(errors: Sequence[float]) -> float:
    """Like max, but not a number is larger than all numbers."""
    return max(errors, key=lambda error: float("inf") if math.isnan(error) else error)


def _ratio(found: float, expected: float) -> float:
    """A gradient is zero, and its norm, if a step has no target: then zero is right."""
    if not expected:
        return math.inf if found else 1.0
    return found / expected


def _furthest(ratios: Sequence[float]) -> float:
    return max(ratios, key=lambda ratio: float("inf") if math.isnan(ratio) else abs(ratio - 1))


def _worst(steps: Sequence[Sequence[Difference]]) -> list[Difference]:
    """Each tensor once, as it was in the step where it was worst."""
    worst: dict[str, Difference] = {}
    for difference in (d for step in steps for d in step):
        known = worst.setdefault(difference.tensor, difference)
        if max(difference.error, difference.drift) > max(known.error, known.drift):
            worst[difference.tensor] = difference
    return sorted(worst.values(), key=lambda d: -max(d.error, d.drift))


def _unexpected(amounts: Mapping[str, Amount], verb: str) -> str:
    kind = {"sent": "bytes", "held": "memory"}[verb]
    for key, amount in amounts.items():
        least = amount.least or amount.predicted
        for rank, (low, measured, high) in enumerate(zip(least, amount.measured, amount.predicted, strict=True)):
            if not low <= measured <= high:
                says = f"{high:,}" if low == high else f"{low:,} to {high:,}"
                return f"{kind}: rank {rank} {verb} {measured:,} bytes ({key}) where the formula says {says}."
    return ""
