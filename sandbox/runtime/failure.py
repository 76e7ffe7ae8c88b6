"""What one rank's failure says, and which of several failures is the cause of the others.

When a rank dies, its peers fail too: their connections close. Often they fail first, for the death itself is noticed
later. What counts is the earliest failure that is not such an echo.
"""

import pickle
import re
import signal
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Self

from sandbox.errors import SandboxError, WorkerError
from sandbox.runtime.board import Entry, ranks

__all__ = ["Failure", "verdict"]

# What gloo, NCCL and the store say when it was the other side that went. Their own errors, such as two ranks that
# disagree on a size, do not match.
_ECHO = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket (closed|timeout)|remote process exited|timed out",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """Why `rank` failed. `moment` is `time.monotonic()`; `error` is set if the user shall see just that."""

    rank: int
    summary: str
    details: str = ""
    echo: bool = False
    error: SandboxError | None = None
    moment: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, rank: int, error: BaseException, last: Entry) -> Self:
        """Describe an exception just caught, that `rank` raised after its `last` collective.

        The frame that caught it is left out of the traceback.
        """
        echo = isinstance(error, RuntimeError | OSError) and bool(_ECHO.search(str(error)))
        inner = error.__traceback__ and error.__traceback__.tb_next
        details = "".join(traceback.format_exception(type(error), error, inner)).rstrip()
        if echo:
            details += f"\nIts last collective: {last}."
        cause = error if isinstance(error, SandboxError) and _travels(error) else None
        return cls(rank, f"rank {rank} failed: {type(error).__name__}: {error}", details, echo, cause)

    @classmethod
    def exit(cls, rank: int, code: int) -> Self:
        """Describe a process that ended without a result. `code` is as in `subprocess`: a signal's is negative."""
        if code >= 0:
            return cls(rank, f"rank {rank} ended with exit code {code} before its work was over")
        try:
            name = f" ({signal.Signals(-code).name})"
        except ValueError:  # a real-time signal
            name = ""
        hint = (
            "If nobody sent it, memory ran out: use fewer ranks or a smaller model." if -code == signal.SIGKILL else ""
        )
        return cls(rank, f"rank {rank} was killed by signal {-code}{name}", hint)

    def __str__(self) -> str:
        return f"{self.summary}\n{self.details}" if self.details else self.summary


def verdict(failures: Collection[Failure], also: str = "") -> SandboxError:
    """The error to raise for these failures of one world, at least one: the cause's text, who failed too, `also`."""
    cause, *others = sorted(failures, key=lambda failure: (failure.echo, failure.moment))
    if cause.error:
        if isinstance(cause.error, WorkerError):
            cause.error.moment = cause.moment
        return cause.error
    echoes = sorted(failure.rank for failure in others if failure.echo)
    rest = sorted(failure.rank for failure in others if not failure.echo)
    text = str(cause)
    if rest:
        text += f"\nAlso failed on {'its' if len(rest) == 1 else 'their'} own: {ranks(rest)}."
    if echoes:
        text += f"\nFailed as a consequence: {ranks(echoes)}."
    return WorkerError(f"{text}\n{also}" if also else text, cause.moment)


def _travels(error: SandboxError) -> bool:
    """Whether the error survives the way to another process."""
    try:
        return str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:
        return False
