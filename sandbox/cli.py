"""The command line. Exit codes: 0 held or done, 1 mismatch or failed run, 2 bad input, 130 interrupted.

Imports of torch stay inside the commands, so that `--help` answers at once.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional

import typer

from sandbox.errors import ConfigError, SandboxError

if TYPE_CHECKING:
    from sandbox.config import Config
    from sandbox.verify.verdict import Verdicts

__all__ = ["app", "main"]

app = typer.Typer(
    name="sandbox",
    help="Train one transformer under every parallelism, and prove that the gradients stay the same.",
    epilog="Start with: sandbox verify configs/zero2.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at configs.", no_args_is_help=True)
app.add_typer(config_app, name="config")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/zero2.yaml.")]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: mesh.dp.degree=4. May be repeated."),
]
Folder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Where metrics, checkpoints and the report go; default: runs/NAME."),
]


@app.command()
def run(
    config: ConfigPath,
    set_: Set = None,
    folder: Folder = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
) -> None:
    """Train. Here, or as one rank if torchrun started this."""
    from sandbox.runtime import warm

    warm("sandbox.run")
    settings = _load(config, set_)
    from sandbox.run import start

    start(settings, folder or settings.run.folder or Path("runs") / settings.name, resume=resume)


@app.command()
def verify(
    configs: Annotated[Optional[list[Path]], typer.Argument(metavar="[CONFIG]...", help="Configs to verify.")] = None,  # noqa: UP045
    set_: Set = None,
    all_: Annotated[bool, typer.Option("--all", help="Every strategy of every engine, by world and option.")] = False,
    only: Annotated[str, typer.Option(metavar="TEXT", help="Of --all, cases whose `engine name` contains this.")] = "",
    dtype: Annotated[
        str, typer.Option(help="float64, the truth; float32, bfloat16; or config, the config's own.")
    ] = "float64",
    json_: Annotated[Optional[Path], typer.Option("--json", metavar="FILE", help="Write all verdicts as JSON.")] = None,  # noqa: UP045
    report: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Write an HTML report.")] = None,  # noqa: UP045
) -> None:
    """Hold sharded runs against the unsharded one: every element of every gradient, norms, parameters, bytes, memory.

    The config's model, mesh and batch are kept. Three steps of SGD with momentum, rough initial values and ragged
    masks take the place of its training, so that nothing hides a bug.
    """
    from sandbox.runtime import warm

    warm("sandbox.verify")
    if bool(configs) == all_:
        raise ConfigError("verify: name configs, or say --all.")
    if dtype not in ("float64", "float32", "bfloat16", "config"):
        raise ConfigError(f"--dtype {dtype}: is not one of float64, float32, bfloat16, config.")
    from sandbox.verify import Case, fixture, matrix

    if all_:
        cases = [case for case in matrix() if only in f"{case.config.engine} {case.config.name}"]
        if not cases:
            raise ConfigError(f"--only {only}: no case of --all has that in its `engine name`.")
    else:
        own = None if dtype == "config" else dtype
        cases = [Case(fixture(_load(path, set_), own), trace=report is not None) for path in configs or []]
    verdicts = _verify(cases)
    _write(verdicts, json_, report)
    if not all(case.held for case in verdicts.cases):
        raise SystemExit(1)


def main() -> NoReturn:
    """Run the command line; user errors are printed without a traceback."""
    try:
        code = app(standalone_mode=False)
    except SandboxError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code or 0)
