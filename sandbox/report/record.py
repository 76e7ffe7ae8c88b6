"""A training run as the report draws it, read from the run's `metrics.jsonl`."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from sandbox.errors import ConfigError
from sandbox.verdict import Measured

__all__ = ["RunRecord"]


class RunRecord(BaseModel):
    """One run: what it was, and its curves as (step, value)."""

    model_config = ConfigDict(extra="forbid")

    name: str
    engine: str = ""
    strategy: str = ""
    mesh: str = ""
    losses: list[tuple[int, float]] = []
    validation: list[tuple[int, float]] = []
    reference: list[tuple[int, float]] = []  # losses of the unsharded run
    grad_norm: list[tuple[int, float]] = []  # before clipping
    unigram_entropy: float | None = None  # nats a token: what counting tokens alone would reach
    tokens_per_second: float | None = None  # median over the steps
    measured: Measured | None = None  # one step, of the newest start that measured one

    @classmethod
    def read(cls, folder: Path, *, reference: Path | None = None) -> Self:
        """Read `folder`/metrics.jsonl, and the losses of the unsharded run from `reference`/metrics.jsonl.

        Raises ConfigError: no such file, or a line that is not JSON. The last line may be cut off: the run was killed.
        """
        try:
            lines = _lines(folder / "metrics.jsonl")
            head: dict[str, Any] = next((line["run"] for line in lines if "run" in line), {})
            steps = [line["measured"] for line in lines if "measured" in line]
            speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
            return cls(
                name=head.get("name", folder.name),
                engine=head.get("engine", ""),
                strategy=head.get("strategy", ""),
                mesh=head.get("mesh", ""),
                losses=_curve(lines, "loss"),
                validation=_curve(lines, "validation_loss"),
                reference=_curve(_lines(reference / "metrics.jsonl"), "loss") if reference else [],
                grad_norm=_curve(lines, "grad_norm"),
                unigram_entropy=head.get("unigram_entropy"),
                tokens_per_second=speeds[len(speeds) // 2] if speeds else None,
                measured=Measured.model_validate(steps[-1]) if steps else None,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"[:200]
            raise ConfigError(f"{folder / 'metrics.jsonl'}: is not what a run writes ({text}).") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the folder of a run.") from None
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            if number < len(texts):
                raise ConfigError(f"{path}: line {number} is not JSON.") from None
    return [line for line in lines if isinstance(line, dict)]


def _curve(lines: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value), by step: a run that was resumed writes some steps again, and the last one counts."""
    return sorted({line["step"]: line[key] for line in lines if line.get(key) is not None}.items())
