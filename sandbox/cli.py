"""The command line. Exit codes: 0 held or done, 1 mismatch or failed run, 2 bad input, 130 interrupted.

Imports of torch stay inside the commands, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional

import typer

from sandbox import launchers
from sandbox.arguments import ConfigPath, Set, read
from sandbox.cli_checkpoint import app as checkpoint_app
from sandbox.cli_config import app as config_app
from sandbox.doctor.command import doctor
from sandbox.errors import ConfigError, SandboxError

if TYPE_CHECKING:
    from rich.console import Console

    from sandbox.verify import Case, Verdicts

__all__ = ["app", "main"]

app = typer.Typer(
    name="sandbox",
    help="Train one transformer under every parallelism, and prove that the gradients stay the same.",
    epilog="Start with: sandbox verify configs/zero2.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(config_app, name="config")
app.add_typer(checkpoint_app, name="checkpoint")

Folder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Where metrics, checkpoints and the report go; default: runs/NAME."),
]
JsonFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json", metavar="FILE", help="Write all verdicts as JSON."),
]
ReportFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(metavar="FILE", help="Write an HTML report, with a timeline of one step."),
]


@app.command()
def run(
    config: ConfigPath,
    set_: Set = None,
    folder: Folder = None,
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
    _writable("--folder", folder / "metrics.jsonl", folders=True)
    from sandbox.run import start
    from sandbox.supervisor import Supervision

    start(settings, folder, resume=resume, autoresume=autoresume, supervision=Supervision(max_restarts, min_ranks))


@app.command()
def verify(
    configs: Annotated[Optional[list[Path]], typer.Argument(metavar="[CONFIG]...", help="Configs to verify.")] = None,  # noqa: UP045
    set_: Set = None,
    all_: Annotated[bool, typer.Option("--all", help="Every strategy of every engine, by world and option.")] = False,
    only: Annotated[str, typer.Option(metavar="TEXT", help="Of --all, cases whose `engine name` contains this.")] = "",
    dtype: Annotated[
        str,
        typer.Option(help="finest: float64, or float32 where an engine is fixed to it. Or float32, bfloat16, config."),
    ] = "finest",
    json_: JsonFile = None,
    report: ReportFile = None,
) -> None:
    """Hold sharded runs against the unsharded one: every element of gradients and parameters, norms, bytes, memory.

    Here, or as one rank if torchrun started this. The config's model, mesh and batch are kept. Three steps of SGD with
    momentum, rough initial values and ragged masks take the place of its training, so that nothing hides a bug.
    """
    from sandbox.runtime import attached, warm

    if not attached():
        warm()
    if bool(configs) == all_:
        raise ConfigError("verify: name configs, such as configs/zero2.yaml, or say --all.")
    if dtype not in ("finest", "float64", "float32", "bfloat16", "config"):
        raise ConfigError(f"--dtype {dtype}: is not one of finest, float64, float32, bfloat16, config.")
    _writable("--json", json_)
    _writable("--report", report)
    settings = [read(path, set_) for path in configs or []]
    from sandbox.plan import finest
    from sandbox.verify import Case, fixture, matrix

    if all_:
        cases = [case for case in matrix() if only in f"{case.config.engine} {case.config.name}"]
        if not cases:
            raise ConfigError(f"--only {only}: no case of --all has that in its `engine name`.")
    else:
        given = None if dtype == "config" else dtype
        cases = [Case(fixture(config, finest(config) if dtype == "finest" else given)) for config in settings]
    verdicts = _verify(cases, lambda verdicts: _show(verdicts, json_, report))
    if not all(case.held for case in verdicts.cases):
        raise SystemExit(1)


@app.command("list")
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
    console = _console()
    console.print(table)
    for engine in engines():
        for name in (name for name in names if name not in strategies(engine)):
            console.print(f"- {engine} {name}: {unsupported(engine).get(name, 'not written yet.')}", markup=False)
    for engine in engines():
        console.print(f"{engine}: {_version(engine)}", markup=False)


@app.command()
def explain(
    strategy: Annotated[
        str,
        typer.Argument(help="A strategy, such as zero2 (see `sandbox list`), or a config: all of its strategies."),
    ],
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Predict for this config; default: the small model of --all, on 4 ranks."),
    ] = None,
    engine: Annotated[str, typer.Option(help="Whose implementation.")] = "native",
    set_: Set = None,
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Draw who holds what, and does what when, as an .svg."),
    ] = None,
) -> None:
    """Say what a strategy cuts, what it sends, and what that is in bytes for a config."""
    from sandbox.plan import find, plan
    from sandbox.report.explain import settled, show

    _writable("--picture", picture)
    if config is None and Path(strategy).suffix in (".yaml", ".yml"):
        settings = read(Path(strategy), set_)
        engine = settings.engine
        names = [planned.strategy.__name__.rpartition(".")[2] for planned in plan(settings)]
        if not names:
            raise ConfigError(f"{strategy}: one rank has no strategy to explain. Set a degree, such as mesh.dp.degree.")
    else:
        find(engine, strategy)
        settings, names = settled(read(config, set_) if config else None, engine, strategy), [strategy]
    for name in names:
        show(_console(), find(engine, name), name, settings)
    if picture:
        from sandbox.report.picture import picture as draw

        picture.write_text(draw(settings), encoding="utf-8")
        _console().print(f"wrote {picture}")


@app.command()
def faults(
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only faults whose name contains this.")] = "",
) -> None:
    """Plant bugs that really happened; each must be caught, its kind of cause named, and its twin must hold."""
    from sandbox.runtime import warm

    warm()
    from sandbox.verify.faults import FAULTS

    chosen = [fault for name, fault in FAULTS.items() if only in name]
    if not chosen:
        near = get_close_matches(only, FAULTS, 3, 0.3)
        raise ConfigError(f"--only {only}: no fault has that in its name. There are: {', '.join(near or FAULTS)}.")
    verdicts = _verify([case for fault in chosen for case in (fault.sick(), fault.clean())])
    pairs = list(zip(chosen, verdicts.cases[::2], verdicts.cases[1::2], strict=True))
    from sandbox.report.detections import show

    show(_console(), pairs)
    if not all(fault.caught(sick) and clean.status == "held" for fault, sick, clean in pairs):
        raise SystemExit(1)


@app.command()
def report(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Run folders, and JSON of verify --json.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the page goes.")] = Path("report.html"),
    reference: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="Run folder of the unsharded run, drawn under the others."),
    ] = None,
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Draw the verdicts as one figure too, .png or .svg."),
    ] = None,
) -> None:
    """Draw runs and verdicts as one HTML page that needs no network."""
    from pydantic import ValidationError

    from sandbox.report.html import write
    from sandbox.report.record import RunRecord
    from sandbox.verdict import Verdicts

    for option, file in (("--out", out), ("--picture", picture)):
        _writable(option, file)
    verdicts, runs = Verdicts(), []
    for source in sources:
        if source.is_dir():
            runs.append(RunRecord.read(source, reference=reference))
            continue
        try:
            found = Verdicts.model_validate_json(source.read_bytes())
        except (OSError, ValidationError) as error:
            text = error.strerror if isinstance(error, OSError) else "not the JSON of verify --json"
            raise ConfigError(f"{source}: cannot be read ({text}).") from None
        verdicts = Verdicts(
            versions=verdicts.versions | found.versions,
            cases=[*verdicts.cases, *found.cases],
            seconds=verdicts.seconds + found.seconds,
        )
    from sandbox.report.picture import pictures

    write(out, verdicts, runs=runs, pictures=pictures(verdicts.cases))
    _console().print(f"wrote {out}")
    if picture:
        from sandbox.report.hero import hero

        hero(picture, verdicts)
        _console().print(f"wrote {picture}")


@config_app.command("show")
def config_show(config: ConfigPath, set_: Set = None) -> None:
    """Print a config with every default filled in."""
    import yaml

    print(yaml.safe_dump(read(config, set_).model_dump(mode="json"), sort_keys=False), end="")  # noqa: T201


def _writable(option: str, file: Path | None, *, folders: bool = False) -> None:
    """See that `file` can be written, before any work is done for it. `folders`: its folders will be made."""
    if file is None:
        return
    place = file.parent
    while folders and not place.exists():
        place = place.parent
    if not place.is_dir() or file.is_dir() or not os.access(file if file.exists() else place, os.W_OK):
        reason = f"{place} is not a folder" if not place.is_dir() else "it is a folder, or not yours to write"
        raise ConfigError(f"{option}: {file} cannot be written: {reason}. Name another place.")


def _verify(cases: "list[Case]", show: "Callable[[Verdicts], None]" = lambda verdicts: None) -> "Verdicts":
    """Verify cases under a progress bar and show what was found; or as one rank of torchrun, the first of which shows.

    It does so before any rank ends: torchrun kills them all when one ends with another code than 0.
    """
    import time

    from rich.progress import track

    from sandbox.runtime import attach, attached
    from sandbox.verify import Verdict, Verdicts, Verifier, together

    started = time.perf_counter()

    def gathered(verdicts: list[Verdict]) -> Verdicts:
        versions = {engine: _version(engine) for engine in dict.fromkeys(case.config.engine for case in cases)}
        return Verdicts(versions=versions, cases=verdicts, seconds=time.perf_counter() - started)

    if attached():
        world, timeout = cases[0].config.mesh.world, max(case.config.run.timeout for case in cases)
        return gathered(attach(world, together, cases, timeout=timeout, on_message=lambda _, v: show(gathered(v))))
    verifier, console = Verifier(), _console(stderr=True)
    held, quiet = verifier.verify_all(cases), not console.is_terminal
    verdicts = gathered(list(track(held, "verifying", len(cases), console=console, transient=True, disable=quiet)))
    show(verdicts)
    return verdicts


def _show(verdicts: "Verdicts", json_: Path | None, report: Path | None) -> None:
    from sandbox.report.tables import show

    show(verdicts, _console())
    if json_:
        json_.write_text(verdicts.model_dump_json(indent=1), encoding="utf-8")
    if report:
        from sandbox.report.html import write
        from sandbox.report.picture import pictures

        write(report, verdicts, pictures=pictures(verdicts.cases))
        _console().print(f"wrote {report}")


def _version(engine: str) -> str:
    """The version of what an engine runs on."""
    from importlib.metadata import version

    from sandbox.plan import missing

    if missing(engine):
        return "not installed: pip install 'distributed-training-sandbox[engines]'"
    own = version("distributed-training-sandbox")
    return f"{own} on torch {version('torch')}" if engine == "native" else version(engine)


def _console(*, stderr: bool = False) -> "Console":
    """Where tables go: as wide as the terminal, or wide enough for every column if there is none."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=160)


app.command()(launchers.launch)
app.command()(doctor)


def main() -> NoReturn:
    """Run the command line; what is the user's to mend is printed without a traceback."""
    from sandbox.runtime import attached, leave

    code = 0
    try:
        app()
    except SandboxError as error:
        print(error, file=sys.stderr)  # noqa: T201
        code = error.exit_code
    except SystemExit as end:  # how the parser ends: of itself, on --help, on what it cannot parse, on Ctrl-C
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if attached():
        leave(code)  # a rank of torchrun runs no destructors
    sys.exit(code)
