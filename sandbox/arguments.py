"""Arguments that several commands share, and how a config on the command line is read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from sandbox.errors import SandboxError

if TYPE_CHECKING:
    from sandbox.config import Config

__all__ = ["ConfigPath", "Set", "read"]

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
