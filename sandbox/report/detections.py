"""The table of planted bugs: which were caught, how, and whether the same case without the bug holds."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from sandbox.report.words import MARKS, error
from sandbox.verdict import Verdict
from sandbox.verify.faults import Fault

__all__ = ["show"]


def show(console: Console, pairs: Iterable[tuple[Fault, Verdict, Verdict]]) -> None:
    """Print a line a fault: its verdict with the bug, then its twin without."""
    table = Table("", "fault", "case", "worst tensor", "error", "ratio", "cos", "cause named", "twin", box=None)
    caught = held = total = 0
    for fault, sick, clean in pairs:
        good, worst = fault.caught(sick), sick.worst
        figures = (worst.tensor, error(worst.error), f"{worst.ratio:.4f}", f"{worst.cos:.4f}") if worst else ("",) * 4
        kind = sick.cause.split(":")[0] if sick.status == "mismatch" else f"{sick.status}, not {fault.kind}"
        table.add_row(
            "✓" if good else "✗", fault.name, f"{fault.strategy} {sick.mesh}", *figures, kind, MARKS[clean.status]
        )
        caught, held, total = caught + good, held + (clean.status == "held"), total + 1
    console.print(table)
    console.print(f"{caught} of {total} planted bugs caught with their kind of cause; {held} of {total} twins hold")
