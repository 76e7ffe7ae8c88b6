"""The verdicts as a table for the terminal, and below it what went wrong, in words."""

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sandbox.report import words
from sandbox.verdict import Verdict, Verdicts

__all__ = ["Report", "show"]

STYLES = {"held": "green", "mismatch": "bold red", "failed": "bold red", "unsupported": "dim"}
SPARE = ("dtype", "allowed", "engine", "time", "strategy", "bytes/theory", "loss", "mesh", "steps")
"""Columns that a narrow terminal goes without, the first first."""
SHOWN = 3  # tensors of one mismatch


class Report:
    """Renderable of rich: table, mismatches, what is not supported, and a line that sums up."""

    def __init__(self, verdicts: Verdicts) -> None:
        self.verdicts = verdicts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the parts, with as many columns as fit."""
        cases = self.verdicts.cases
        if cases:
            spare = list(SPARE)
            table = _table(cases, ())
            while spare and Measurement.get(console, options.update(width=10_000), table).maximum > options.max_width:
                spare.pop(0)
                table = _table(cases, SPARE[: len(SPARE) - len(spare)])
            yield table
        for case in cases:
            if case.status in ("mismatch", "failed"):
                yield Group("", _finding(case))
        unsupported = [case for case in cases if case.status == "unsupported"]
        if unsupported:
            yield Group("", *(Text(f"{case.name}: cannot run here. {case.cause}", "dim") for case in unsupported))
        yield Group("", Text(words.summary(self.verdicts), "bold"))


def show(verdicts: Verdicts, console: Console | None = None) -> None:
    """Print the report, on standard output by default."""
    (console or Console()).print(Report(verdicts))


def _table(cases: list[Verdict], without: tuple[str, ...]) -> Table:
    steps = max((len(case.losses) for case in cases), default=0)
    right = ("loss", "gradients", "steps", "bytes/theory", "time")
    numbers = (*right, "allowed")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", width=1)
    columns = ["config", "engine", "strategy", "mesh", "dtype", *right]
    if any(case.dtype != "float64" for case in cases):
        columns.insert(columns.index("bytes/theory"), "allowed")
    columns = [column for column in columns if column not in without]
    for column in columns:
        header = f"{steps} steps" if column == "steps" and steps else column
        table.add_column(header, justify="right" if column in numbers else "left", no_wrap=True, overflow="ellipsis")
    for case in cases:
        cells = _cells(case)
        mark = Text(words.MARKS[case.status], STYLES[case.status])
        table.add_row(mark, *(cells[column] for column in columns), style="dim" if case.status == "unsupported" else "")
    return table


def _cells(case: Verdict) -> dict[str, Text]:
    errors = {
        "loss": case.loss,
        "gradients": words.worst(case.gradients),
        "steps": words.worst(case.parameters or case.reported),
    }
    ran = case.status in ("held", "mismatch")
    cells = {
        "config": Text(case.name),
        "engine": Text(case.engine),
        "strategy": Text(case.strategy),
        "mesh": Text(case.mesh),
        "dtype": Text(case.dtype),
        "bytes/theory": Text(words.factor(case.traffic.values())),
        "allowed": Text(words.error(case.tolerance) if ran else words.NONE),
        "time": Text(words.duration(case.seconds) if case.seconds else words.NONE),
    }
    for column, value in errors.items():
        told = column == "steps" and case.reported
        beyond = ran and not told and words.exceeds(value, case.tolerance)
        cells[column] = Text(words.error(value) if ran else words.NONE, "bold red" if beyond else "")
    return cells


def _finding(case: Verdict) -> RenderableType:
    """The paragraph about a case that did not hold."""
    title = Text.assemble((case.name, "bold"), f": {words.headline(case)}")
    tensors = words.differing(case)
    shown = tensors[:SHOWN]
    wide = max((len(t.tensor) for t in shown), default=0)
    lines = [f"{t.tensor:{wide}}   error {words.error(t.error)}   ratio {t.ratio:.4f}   cos {t.cos:.4f}" for t in shown]
    if len(tensors) > SHOWN:
        lines.append(f"… and {len(tensors) - SHOWN} more")
    lines += [case.cause] if case.cause else []
    return Group(title, *(Padding(Text(line), (0, 0, 0, 2), expand=False) for line in lines))
