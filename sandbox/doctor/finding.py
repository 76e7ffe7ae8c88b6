"""One thing that the doctor looked at."""

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found; and if that is wrong, why and how to mend it, in sentences."""

    what: str
    found: str
    wrong: str = ""
