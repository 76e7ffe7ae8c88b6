"""`sandbox config`: a config with its defaults, and other libraries' configs, written and read."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from sandbox.cli.arguments import ConfigPath, Set, read, writable

__all__ = ["app"]

app = typer.Typer(help="Look at configs, and carry them to other libraries and back.", no_args_is_help=True)

Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", metavar="FILE", help="Where it goes; default: standard output."),
]


@app.command()
def show(config: ConfigPath, set_: Set = None) -> None:
    """Print a config with every default filled in."""
    import yaml

    typer.echo(yaml.safe_dump(read(config, set_).model_dump(mode="json"), sort_keys=False), nl=False)


@app.command("export")
def export_(
    config: ConfigPath,
    to: Annotated[str, typer.Option(help="deepspeed-json, accelerate-yaml, or torchrun, a command.")],
    set_: Set = None,
    out: Out = None,
) -> None:
    """Write another library's own config for the same training. Notes say what that file has no place for."""
    from sandbox.config import load
    from sandbox.interchange import export

    _write(*export(load(config, set_ or ()), to, config), out)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="DeepSpeed's JSON, or Accelerate's YAML.")],
    ranks: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Data ranks, where the file does not say how many."),
    ] = None,
    engine: Annotated[str, typer.Option(help="Whose implementation is to run it.")] = "native",
    out: Out = None,
) -> None:
    """Read another library's config into ours. Keys that cannot be carried over are errors, each with its reason."""
    import yaml

    from sandbox import interchange
    from sandbox.plan import plan

    config, notes = interchange.read(file, engine=engine, ranks=ranks)
    plan(config)
    tree = config.model_dump(mode="json", exclude_unset=True, exclude={"name"})
    _write(yaml.safe_dump(tree, sort_keys=False), notes, out)


def _write(text: str, notes: list[str], out: Path | None) -> None:
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if out is None:
        typer.echo(text, nl=False)
        return
    writable("--out", out)
    from sandbox.report.output import output

    with output(out) as file:
        file.write_text(text, encoding="utf-8")
