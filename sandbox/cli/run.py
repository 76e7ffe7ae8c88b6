"""`sandbox run`: train."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from sandbox.cli.arguments import ConfigPath, Set, read, writable

__all__ = ["run"]


def run(
    config: ConfigPath,
    set_: Set = None,
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Where metrics, checkpoints and the report go; default: runs/NAME."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    autoresume: Annotated[bool, typer.Option("--autoresume", help="The same, if there is one.")] = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="Start again so often from the last checkpoint if a rank fails.")
    ] = 0,
    min_ranks: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Go on without lost ranks, on fewer: dp shrinks, the global batch stays."),
    ] = None,
) -> None:
    """Train; here, or as one rank if torchrun started this."""
    from sandbox.runtime import attached, warm

    if not attached():
        warm()
    settings = read(config, set_)
    folder = folder or settings.run.folder or Path("runs") / settings.name
    writable("--folder", folder / "metrics.jsonl", folders=True)
    from sandbox.run import start
    from sandbox.supervisor import Supervision

    start(settings, folder, resume=resume, autoresume=autoresume, supervision=Supervision(max_restarts, min_ranks))
