"""`sandbox report`: runs and verdicts, drawn."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from sandbox.cli.arguments import terminal, writable
from sandbox.errors import ConfigError

__all__ = ["report"]


def report(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="Run folders, and JSON of verify --json or slow_link.py.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the page goes.")] = Path("report.html"),
    reference: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="Run folder of the unsharded run, drawn under the others."),
    ] = None,
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Draw the verdicts as one figure too, .png or .svg."),
    ] = None,
    table: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write the verdicts as a table in Markdown too."),
    ] = None,
) -> None:
    """Draw runs and verdicts as one HTML page that needs no network."""
    from pydantic import TypeAdapter, ValidationError

    from sandbox.report.html import write
    from sandbox.report.links import SlowLink
    from sandbox.report.output import output
    from sandbox.report.record import RunRecord
    from sandbox.verdict import Verdicts

    for option, file in (("--out", out), ("--picture", picture), ("--table", table)):
        writable(option, file)
    verdicts, runs, links = Verdicts(), [], []
    for source in sources:
        if source.is_dir():
            runs.append(RunRecord.read(source, reference=reference))
            continue
        try:
            found = TypeAdapter[Verdicts | SlowLink](Verdicts | SlowLink).validate_json(source.read_bytes())
        except (OSError, ValidationError) as error:
            text = error.strerror if isinstance(error, OSError) else "not the JSON of verify --json"
            raise ConfigError(f"{source}: cannot be read ({text}).") from None
        if isinstance(found, SlowLink):
            links.append(found)
            continue
        verdicts = Verdicts(
            versions=verdicts.versions | found.versions,
            cases=[*verdicts.cases, *found.cases],
            seconds=verdicts.seconds + found.seconds,
        )
    from sandbox.report.picture import pictures

    measured = [run.measured for run in runs if run.measured]
    write(out, verdicts, runs=runs, pictures=pictures(verdicts.cases, measured), links=links)
    terminal().print(f"wrote {out}")
    if picture:
        from sandbox.report.hero import hero

        hero(picture, verdicts)
        terminal().print(f"wrote {picture}")
    if table:
        from sandbox.report import markdown

        with output(table) as file:
            file.write_text(markdown.table(verdicts), encoding="utf-8")
        terminal().print(f"wrote {table}")
