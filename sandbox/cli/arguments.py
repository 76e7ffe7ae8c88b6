"""What several commands share: arguments, how a config is read, and where things are shown."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from sandbox.errors import ConfigError, SandboxError

if TYPE_CHECKING:
    from rich.console import Console

    from sandbox.config import Config

__all__ = ["ConfigPath", "Set", "read", "terminal", "version_of", "writable"]

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/zero2.yaml.")]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: mesh.dp.degree=4. May be repeated."),
]


def read(path: Path, overrides: list[str] | None) -> "Config":
    """Read a config and check all that can be known before anything starts."""
    from sandbox.config import load
    from sandbox.plan import plan

    config = load(path, overrides or ())
    try:
        plan(config)
    except SandboxError as error:
        raise type(error)(f"{path}: {error}") from None
    return config


def writable(option: str, file: Path | None, *, folders: bool = False) -> None:
    """See that `file` can be written, before any work is done for it. `folders`: its folders will be made."""
    if file is None:
        return
    place = file.parent
    while folders and not place.exists():
        place = place.parent
    if not place.is_dir() or file.is_dir() or not os.access(file if file.exists() else place, os.W_OK):
        reason = f"{place} is not a folder" if not place.is_dir() else "it is a folder, or not yours to write"
        raise ConfigError(f"{option}: {file} cannot be written: {reason}. Name another place.")


def version_of(engine: str) -> str:
    """The version of what an engine runs on."""
    from importlib.metadata import version

    from sandbox.plan import missing

    if missing(engine):
        return "not installed: pip install 'distributed-training-sandbox[engines]'"
    own = version("distributed-training-sandbox")
    return f"{own} on torch {version('torch')}" if engine == "native" else version(engine)


def terminal(*, stderr: bool = False) -> "Console":
    """Where tables go: as wide as the terminal, or wide enough for every column if there is none."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=160)
