"""Reference against sharded run: the judgement.

The reference is the same code with an empty plan, in one process. It is run a second time with its sums taken in
another order, and, below float64, a third time from parameters moved by one unit in the last place. How far these
drift apart is the noise of the training itself:

    floor       a gradient that is zero in exact arithmetic (a key's bias, without rotary positions) is noise. A tensor
                whose noise exceeds 256 eps of its size is measured against noise / (256 eps) instead of its size.
    tolerance   float64: 1e-12. Below: 4 times the largest noise of any tensor. In bfloat16, where a strategy keeps
                the model's own parameters as bfloat16, the third run is from parameters rounded to that.
"""

import functools
import math
import pickle
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sandbox.config import Config
from sandbox.errors import SandboxError, UnsupportedError
from sandbox.measure import align
from sandbox.plan import name_of, plan, predict, preload
from sandbox.program import training_loss
from sandbox.runtime import Member, launch, warm
from sandbox.trainer import Trainer
from sandbox.verdict import Amount, Difference, Verdict
from sandbox.verify.capture import Capture, Subject, capture
from sandbox.verify.compare import assemble, differences, spread
from sandbox.verify.diagnose import Findings, diagnose

__all__ = ["Case", "Verifier", "fixture"]

RowLoss = tuple[float, int]  # sum of losses, valid targets

FLOOR = 256  # eps of a tensor's size, beyond which its noise makes it a zero
MARGIN = 4  # tolerances below float64, in units of the noise
EXACT = 1e-12  # tolerance in float64


@dataclass(frozen=True)
class Case:
    """A config to verify. `prepare` tampers with each rank's trainer before it starts (a function that pickles).

    A `subject` takes the place of the config's model and corpus. What it sends and holds is not predicted.
    """

    config: Config
    prepare: Callable[[Trainer], Any] | None = None
    subject: Subject | None = None


@dataclass(frozen=True)
class Reference:
    """The unsharded run, by step, and what its noise says of floors and tolerance."""

    run: Capture
    gradients: list[dict[str, Tensor]]
    parameters: list[dict[str, Tensor]]
    buffers: list[dict[str, Tensor]]
    floors: list[dict[str, float]]  # of the gradients
    tolerance: float
    rows: list[RowLoss]  # of the first step


def fixture(config: Config, dtype: str | None = "float64") -> Config:
    """The training that shows what `config` computes: its model, mesh and batch, with nothing left that hides a bug.

    Three steps of SGD with momentum, for Adam hides a wrong scale; a learning rate that changes; ragged masks with
    whole rows hidden; biases and norms away from 0 and 1. `dtype` None keeps the config's own.
    """
    train = {
        "steps": 3, "optimizer": "sgd_momentum", "lr": 0.05, "weight_decay": 0.1, "schedule": "linear", "warmup": 0,
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
    """Verifies cases. A reference is run once for all cases that share its training.

    `world` runs the work of each rank of a world, and returns what each did; the default launches ranks here.
    """

    def __init__(self, world: Callable[..., list[Any]] | None = None) -> None:
        self._world = world or launch
        self._references: dict[tuple[str, bytes], Reference] = {}
        self._lock = threading.Lock()  # of the references

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
            warm(*preload(config.engine))
            reference = self.reference(config, case.subject)
            started = time.perf_counter()
            work = config, case.prepare, case.subject
            ranks = self._world(config.mesh.world, capture, *work, timeout=config.run.timeout)
            self._judge(verdict, case, reference, ranks)
        except UnsupportedError as error:
            verdict.status, verdict.cause = "unsupported", str(error)
        except SandboxError as error:
            verdict.status, verdict.cause = "failed", str(error)
        verdict.seconds = time.perf_counter() - started
        return verdict

    def reference(self, config: Config, subject: Subject | None = None) -> Reference:
        """The unsharded run of a training, from memory if it was run before."""
        rounded = any(getattr(p.strategy, "ROUNDS", False) for p in plan(config))
        move = round_off if rounded and config.train.dtype == "bfloat16" else nudge
        plain = config.reference().model_copy(update={"name": "", "run": type(config.run)()})
        key = f"{move.__name__} {plain.model_dump_json()}", pickle.dumps(subject)
        with self._lock:
            if key not in self._references:
                work = config.reference(), move, subject
                runs, rows = self._world(1, _reference_runs, *work, timeout=config.run.timeout)[0]
                self._references[key] = _reference(runs, rows, config.train.dtype)
            return self._references[key]

    def _judge(self, verdict: Verdict, case: Case, reference: Reference, ranks: list[Capture]) -> None:
        config, steps = case.config, range(case.config.train.steps)
        losses = [sum(rank.losses[step] for rank in ranks if not rank.place["tp"]) for step in steps]
        expected = reference.run.losses
        found = Findings(
            config=config,
            tolerance=reference.tolerance,
            losses=[abs(a - b) / max(abs(b), 1e-300) for a, b in zip(losses, expected, strict=True)],
            norms=[_furthest([_ratio(r.norms[s], reference.run.norms[s]) for r in ranks]) for s in steps],
            rates=[_furthest([r.rates[s] / reference.run.rates[s] for r in ranks]) for s in steps],
            gradients=[
                differences(assemble([r.gradients[s] for r in ranks]), reference.gradients[s], reference.floors[s])
                for s in steps
            ],
            parameters=[
                differences(assemble([r.parameters[s] for r in ranks]), reference.parameters[s], {})
                for s in range(config.train.steps + 1)
            ],
            buffers=[differences(assemble([r.buffers[s] for r in ranks]), reference.buffers[s], {}) for s in steps],
            rows=_rows(ranks, reference.run),
            weights=_weights(ranks, reference.rows, config),
            amounts="",
        )
        if case.subject is None:
            predictions = predict(config)
            least = [p.least for p in predictions]
            verdict.traffic = _amounts([p.traffic for p in predictions], [r.traffic for r in ranks], least)
            verdict.memory = _amounts([p.memory for p in predictions], [r.memory for r in ranks], [])
        found = replace(found, amounts=_unexpected(verdict.traffic, "sent") or _unexpected(verdict.memory, "held"))
        verdict.tolerance = found.tolerance
        verdict.losses, verdict.reference_losses = losses, expected
        verdict.loss, verdict.norm = _largest(found.losses), _largest([abs(ratio - 1) for ratio in found.norms])
        verdict.gradients = _worst(found.gradients)
        verdict.parameters = list(found.parameters[-1])
        verdict.peak = [rank.peak for rank in ranks]
        verdict.timeline = align([rank.spans for rank in ranks])
        good = (
            _largest([verdict.loss, verdict.norm]) <= found.tolerance
            and not any(found.wrong(step) for step in (*found.gradients, *found.parameters, *found.buffers))
            and not found.rows
            and not found.amounts
        )
        if not good:
            verdict.status, verdict.cause = "mismatch", diagnose(found)


def _reference_runs(
    member: Member, config: Config, move: Callable[[Trainer], None], subject: Subject | None
) -> tuple[list[Capture], list[RowLoss]]:
    """The training, its sums in another order, and below float64 from neighbouring parameters; and each row's loss."""
    losses: list[RowLoss] = []
    rows = config.train.model_copy(update={"microbatches": config.train.batch})
    runs = [
        capture(member, config, lambda trainer: losses.extend(_row_losses(trainer)), subject),
        capture(member, config.model_copy(update={"train": rows}), None, subject),
    ]
    if config.train.dtype != "float64":
        runs.append(capture(member, config, move, subject))
    return runs, losses


@torch.no_grad()
def _row_losses(trainer: Trainer) -> list[RowLoss]:
    """Each row's loss in the first step."""
    batch, program = trainer.batch(), trainer.program
    kept = {buffer: buffer.clone() for buffer in program.model.buffers()}
    program.model.train()
    losses = [(training_loss(program, row).item(), row.valid) for row in batch.split_rows(len(batch.rows))]
    for buffer, value in kept.items():
        buffer.copy_(value)
    return losses


@torch.no_grad()
def nudge(trainer: Trainer) -> None:
    """Move every parameter by one unit in the last place, up or down in turn."""
    for param in trainer.program.parameters.values():
        signs = torch.ones(param.numel(), dtype=param.dtype)
        signs[::2] = -1
        param.mul_(1 + torch.finfo(param.dtype).eps * signs.view_as(param))


@torch.no_grad()
def round_off(trainer: Trainer) -> None:
    """Move every parameter to the nearest bfloat16."""
    for param in trainer.program.parameters.values():
        param.copy_(param.bfloat16())


def _reference(runs: Sequence[Capture], rows: list[RowLoss], dtype: str) -> Reference:
    grads, params, buffers = ([_wholes(run, kind) for run in runs] for kind in ("gradients", "parameters", "buffers"))
    eps = torch.finfo(getattr(torch, dtype)).eps
    floors, amplified = [], 0.0
    for step, (first, *others) in enumerate(zip(*grads, strict=True)):
        noise = functools.reduce(_larger, [spread(first, other) for other in others])
        floors.append({name: value / (FLOOR * eps) for name, value in noise.items()})
        sizes = {name: max(value.abs().max().item(), floors[step][name]) or 1.0 for name, value in first.items()}
        amplified = max(amplified, *(noise[name] / sizes[name] for name in first))
    tolerance = EXACT if dtype == "float64" else MARGIN * amplified
    return Reference(runs[0], grads[0], params[0], buffers[0], floors, tolerance, rows)


def _wholes(run: Capture, kind: str) -> list[dict[str, Tensor]]:
    return [{name: whole.value for name, whole in assemble([step]).items()} for step in getattr(run, kind)]


def _larger(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: max(value, other[name]) for name, value in one.items()}


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


def _rows(ranks: Sequence[Capture], reference: Capture) -> str:
    """What is wrong with the rows that ranks saw, in words: each is for one data rank, with all of its tokens.

    Ranks along cp share a row's columns; ranks along pp and tp see what their neighbours see.
    """
    for step, expected in enumerate(reference.tokens):
        wanted = dict(expected)
        for stage in sorted({(rank.place["pp"], rank.place["tp"]) for rank in ranks}):
            seen: dict[int, int] = defaultdict(int)
            owners: dict[int, set[tuple[int, ...]]] = defaultdict(set)
            for rank in (rank for rank in ranks if (rank.place["pp"], rank.place["tp"]) == stage):
                for row, checksum in rank.tokens[step]:
                    seen[row] += checksum
                    owners[row].add(tuple(rank.place[axis] for axis in ("dp_replicate", "dp_shard", "ep")))
            twice = sorted(row for row, who in owners.items() if len(who) > 1)
            never = sorted(set(wanted) - set(seen))
            if twice or never or set(seen) - set(wanted):
                parts = [f"rows {_list(twice)} were seen more than once"] if twice else []
                parts += [f"rows {_list(never)} were never seen"] if never else []
                return f"in step {step + 1}, {' and '.join(parts) or 'other rows were seen'}."
            other = sorted(row for row, checksum in seen.items() if (checksum - wanted[row]) % 2**64)
            if other:
                return f"in step {step + 1}, rows {_list(other)} hold other tokens than the reference's."
    return ""


def _weights(ranks: Sequence[Capture], rows: Sequence[RowLoss], config: Config) -> str:
    """Which wrong weighting of rows, if any, explains each rank's share of the first step's loss."""
    if config.mesh.world != config.mesh.dp.degree:
        return ""  # ranks that share rows do not have losses of their own
    parts = [
        [[rows[row] for row in part] for part in _split([row for row, _ in rank.tokens[0]], config.train.microbatches)]
        for rank in ranks
    ]
    seen, valid = len(ranks), max(1, sum(count for _, count in rows))

    def mean(part: Sequence[RowLoss]) -> float:
        return sum(loss for loss, _ in part) / max(1, sum(count for _, count in part))

    wrong: dict[str, list[float]] = {
        "each microbatch's loss is its own mean, and the mean of those is taken": [
            sum(mean(part) for part in mine) / len(mine) / seen for mine in parts
        ],
        "each rank's loss is its own mean, and the mean of those is taken": [
            mean([row for part in mine for row in part]) / seen for mine in parts
        ],
        "the last microbatch is missing": [
            sum(loss for part in mine[:-1] for loss, _ in part) / valid for mine in parts
        ],
    }
    for text, shares in wrong.items():
        if all(abs(rank.losses[0] - share) <= 1e-4 * abs(share) for rank, share in zip(ranks, shares, strict=True)):
            return text
    return ""


def _split(rows: Sequence[int], parts: int) -> list[list[int]]:
    return [part.tolist() for part in torch.tensor(rows).tensor_split(parts)]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")


def _amounts(
    predicted: Sequence[Mapping[str, float]],
    measured: Sequence[Mapping[str, int]],
    least: Sequence[Mapping[str, float]],
) -> dict[str, Amount]:
    keys = dict.fromkeys(key for ranks in (predicted, measured) for rank in ranks for key in rank)
    return {
        key: Amount(
            predicted=[int(r.get(key, 0)) for r in predicted],
            measured=[r.get(key, 0) for r in measured],
            least=[int(r[key]) for r in least if key in r],
        )
        for key in keys
    }


def _unexpected(amounts: Mapping[str, Amount], verb: str) -> str:
    for key, amount in amounts.items():
        least = amount.least or amount.predicted
        for rank, (low, measured, high) in enumerate(zip(least, amount.measured, amount.predicted, strict=True)):
            if not low <= measured <= high:
                says = f"{high:,}" if low == high else f"{low:,} to {high:,}"
                return f"bytes: rank {rank} {verb} {measured:,} bytes ({key}) where the formula says {says}."
    return ""
