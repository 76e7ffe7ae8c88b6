"""What a step did and what a verification found, as plain data: a table, JSON, the report's drawings."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field, model_validator

__all__ = ["PLAIN", "Amount", "Difference", "Measured", "Span", "Verdict", "Verdicts"]

PLAIN = ConfigDict(extra="forbid", ser_json_inf_nan="strings")
"""Of records that are written as JSON: unknown keys are refused, and what is no number survives."""


class Difference(BaseModel):
    """How one tensor differs from the reference.

    `error` = max|x - ref| / max(max|ref|, floor); `ratio` = <x, ref> / <ref, ref>; `cos` = their cosine.
    """

    model_config = PLAIN

    tensor: str
    error: float
    ratio: float
    cos: float
    drift: float = 0.0  # largest difference between ranks that hold the same element, over max|ref|
    floored: bool = False  # the floor decided: the reference itself is zero up to rounding


class Amount(BaseModel):
    """Bytes as predicted by the strategy's formula and as measured; one entry a rank where ranks differ.

    With `least`, the data decide: `predicted` are the most.
    """

    model_config = PLAIN

    predicted: list[int]
    measured: list[int]
    least: list[int] = []


class Span(BaseModel):
    """Something a rank was busy with, in seconds since its step began."""

    model_config = PLAIN

    lane: Literal["compute", "collective"]
    name: str  # forward, backward, optimizer; or the collective and its axis
    start: float
    end: float
    bytes: int = 0


class Measured(BaseModel):
    """What was trained, and what one step of it sent, held and did when, beside what theory says."""

    model_config = PLAIN

    name: str
    engine: str
    strategy: str
    mesh: str
    dtype: str
    world: int
    config: dict[str, Any] = {}
    traffic: dict[str, Amount] = {}  # "all_reduce dp": bytes sent by a rank in one step
    memory: dict[str, Amount] = {}  # "parameters", "gradients", "optimizer": bytes held by a rank after a step
    peak: list[int] = []  # most bytes live at once during a step, by rank; empty if not measured
    timeline: list[list[Span]] = []  # by rank, of one step
    unmeasured: list[str] = []  # what of it could not be measured, and why: sentences


class Verdict(Measured):
    """One config, held against its reference."""

    status: Literal["held", "mismatch", "failed", "unsupported"]
    tolerance: float = 0.0
    loss: float = 0.0  # largest relative error over the steps
    norm: float = 0.0  # of the global gradient norm
    gradients: list[Difference] = []  # worst over the steps, each logical tensor once, worst first
    parameters: list[Difference] = []  # after the last step
    reported: list[Difference] = []  # the same, of AdamW, which is told and never judged
    cause: str = ""  # in words, of a mismatch; the reason, of a failed or unsupported case
    seconds: float = 0.0
    losses: list[float] = []
    reference_losses: list[float] = []

    @model_validator(mode="before")
    @classmethod
    def _without_what_follows(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if key != "worst"} if isinstance(data, dict) else data

    @computed_field  # type: ignore[prop-decorator]
    @property
    def worst(self) -> Difference | None:
        """The gradient that differs most. Written as well as told, and worked out again when read."""
        return self.gradients[0] if self.gradients else None

    @property
    def held(self) -> bool:
        """Whether all of it is as it should be."""
        return self.status in ("held", "unsupported")


class Verdicts(BaseModel):
    """A whole verification, and what it ran on."""

    model_config = PLAIN

    versions: dict[str, str] = {}
    cases: list[Verdict] = []
    seconds: float = 0.0
