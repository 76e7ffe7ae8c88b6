"""What can go wrong, as types. A user's error never shows a traceback: the command line prints its text."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandbox.verdict import Verdict

__all__ = [
    "CheckpointError",
    "ConfigError",
    "MeshError",
    "ParityError",
    "SandboxError",
    "TrainingError",
    "UnsupportedError",
    "WorkerError",
]


class SandboxError(Exception):
    """Base of every error that is meant to be read by the user. `exit_code` ends the process."""

    exit_code = 1


class ConfigError(SandboxError):
    """A setting is wrong. The text names the field and the fix."""

    exit_code = 2


class MeshError(ConfigError):
    """The processes at hand cannot form the mesh that was asked for."""


class UnsupportedError(ConfigError):
    """The setting is meaningful, but this engine cannot run it here. The text gives the reason."""


class CheckpointError(ConfigError):
    """A checkpoint is absent, damaged or of another training."""


class ParityError(SandboxError, AssertionError):
    """A sharded run and its reference differ: `verdict` says where, if a run was made at all."""

    def __init__(self, text: str, verdict: "Verdict | None" = None) -> None:
        super().__init__(text)
        self.verdict = verdict


class TrainingError(SandboxError):
    """The training itself cannot go on, and would fail alike if it was started again: a loss that is no number."""


class WorkerError(SandboxError):
    """A rank failed, died or did not answer in time. The text leads with that rank's error.

    `moment` is when, by `time.monotonic()`: the failure, or of a hang the last sign of life; None if nobody knows.
    """

    def __init__(self, text: str, moment: float | None = None) -> None:
        super().__init__(text)
        self.moment = moment
