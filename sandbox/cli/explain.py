"""`sandbox list` and `sandbox explain`: what there is, and what it does."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from sandbox.cli.arguments import Set, read, terminal, version_of, writable
from sandbox.errors import ConfigError

__all__ = ["explain", "list_"]


def list_() -> None:
    """Show strategies by engine: what runs, and why the rest does not."""
    from rich.table import Table

    from sandbox.plan import engines, find, strategies, unsupported

    names = dict.fromkeys(name for engine in engines() for name in (*strategies(engine), *unsupported(engine)))
    table = Table("strategy", "axis", *engines(), box=None)
    for name in names:
        axis = next(find(engine, name).AXIS for engine in engines() if name in strategies(engine))
        marks = ["✓" if name in strategies(engine) else "-" for engine in engines()]
        table.add_row(name, axis, *marks)
    console = terminal()
    console.print(table)
    for engine in engines():
        for name in (name for name in names if name not in strategies(engine)):
            console.print(f"- {engine} {name}: {unsupported(engine)[name]}", markup=False)
    for engine in engines():
        console.print(f"{engine}: {version_of(engine)}", markup=False)


def explain(
    strategy: Annotated[
        str,
        typer.Argument(help="A strategy, such as zero2 (see `sandbox list`), or a config: all of its strategies."),
    ],
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Predict for this config; default: the small model of --all, on 4 ranks."),
    ] = None,
    engine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Whose implementation; default: native, or that of a config alone."),
    ] = None,
    set_: Set = None,
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Draw who holds what, and does what when, as an .svg."),
    ] = None,
) -> None:
    """Say what a strategy cuts, what it sends, and what that is in bytes for a config."""
    from sandbox.plan import find, plan
    from sandbox.report.explain import settled, show

    writable("--picture", picture)
    if config is None and Path(strategy).suffix in (".yaml", ".yml"):
        if engine is not None:
            raise ConfigError(f"--engine: {strategy} names its own. Change it by --set engine={engine}.")
        settings = read(Path(strategy), set_)
        engine = settings.engine
        names = [planned.strategy.__name__.rpartition(".")[2] for planned in plan(settings)]
        if not names:
            raise ConfigError(f"{strategy}: one rank has no strategy to explain. Set a degree, such as mesh.dp.degree.")
    else:
        if set_ and config is None:
            raise ConfigError("--set: there is no config to change. Name one after the strategy.")
        engine = engine or "native"
        find(engine, strategy)
        settings, names = settled(read(config, set_) if config else None, engine, strategy), [strategy]
    for name in names:
        show(terminal(), find(engine, name), name, settings)
    if picture:
        from sandbox.report.output import output
        from sandbox.report.picture import picture as draw

        with output(picture) as file:
            file.write_text(draw(settings), encoding="utf-8")
        terminal().print(f"wrote {picture}")
