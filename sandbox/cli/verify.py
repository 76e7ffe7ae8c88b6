"""`sandbox verify`, and `sandbox faults`, which shows that it finds what it should."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional, TypeVar

import typer

from sandbox.cli.arguments import Set, read, terminal, version_of, writable
from sandbox.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from sandbox.verify import Case, Verdicts

__all__ = ["faults", "verify"]

T = TypeVar("T")


def verify(
    configs: Annotated[Optional[list[Path]], typer.Argument(metavar="[CONFIG]...", help="Configs to verify.")] = None,  # noqa: UP045
    set_: Set = None,
    all_: Annotated[bool, typer.Option("--all", help="Every strategy of every engine, by world and option.")] = False,
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="TEXT", help="Of --all, cases whose `engine name` contains this. May be repeated."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="finest: float64, or float32 where an engine is fixed to it. Or float32, bfloat16, config."),
    ] = "finest",
    json_: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="Write all verdicts as JSON."),
    ] = None,
    report: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write an HTML report, with a timeline of one step."),
    ] = None,
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
    if only and not all_:
        raise ConfigError("--only: chooses among the cases of --all. Say --all and name no config, or leave it out.")
    if all_ and (set_ or dtype != "finest"):
        raise ConfigError("--all: its cases have their own settings. Name configs to use --set or --dtype.")
    if dtype not in ("finest", "float64", "float32", "bfloat16", "config"):
        raise ConfigError(f"--dtype {dtype}: is not one of finest, float64, float32, bfloat16, config.")
    writable("--json", json_)
    writable("--report", report)
    settings = [read(path, set_) for path in configs or []]
    from sandbox.plan import finest
    from sandbox.verify import Case, fixture, matrix

    if all_:
        named = [(f"{case.config.engine} {case.config.name}", case) for case in matrix()]
        cases = _chosen(named, only, "case of --all has that in its `engine name`")
    else:
        given = None if dtype == "config" else dtype
        cases = [Case(fixture(config, finest(config) if dtype == "finest" else given)) for config in settings]
    verdicts = _verify(cases, lambda verdicts: _show(verdicts, json_, report), measure=bool(json_ or report))
    if not all(case.held for case in verdicts.cases):
        raise SystemExit(1)


def faults(
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="TEXT", help="Only faults whose name contains this. May be repeated."),
    ] = None,
) -> None:
    """Plant bugs that really happened; each must be caught, its kind of cause named, and its twin must hold."""
    from sandbox.runtime import warm

    warm()
    from sandbox.verify.faults import FAULTS

    chosen = _chosen(list(FAULTS.items()), only, "fault has that in its name")
    twins = [(fault, fault.sick(), fault.clean()) for fault in chosen]
    cases = list(dict.fromkeys(case for _, *both in twins for case in both))
    verdict = dict(zip(cases, _verify(cases).cases, strict=True))
    pairs = [(fault, verdict[sick], verdict[clean]) for fault, sick, clean in twins]
    from sandbox.report.detections import show

    show(terminal(), pairs)
    if not all(fault.caught(sick) and clean.status == "held" for fault, sick, clean in pairs):
        raise SystemExit(1)


def _chosen(named: Sequence[tuple[str, T]], only: Sequence[str] | None, what: str) -> list[T]:
    """Those whose name contains one of the texts, or all if there is none; a text that is in no name is an error."""
    names = [name for name, _ in named]
    for text in only or ():
        if not any(text in name for name in names):
            some = ", ".join(get_close_matches(text, names, 3, 0.3)) or f"{', '.join(names[:3])} and others"
            raise ConfigError(f"--only {text}: no {what}. There are: {some}.")
    return [thing for name, thing in named if any(text in name for text in only or ("",))]


def _verify(
    cases: "list[Case]",
    show: "Callable[[Verdicts], None]" = lambda verdicts: None,
    *,
    measure: bool = False,
) -> "Verdicts":
    """Verify cases under a progress bar and show what was found; or as one rank of torchrun, the first of which shows.

    It does so before any rank ends: torchrun kills them all when one ends with another code than 0.
    """
    import time

    from rich.progress import track

    from sandbox.plan import get_ready
    from sandbox.runtime import attach, attached
    from sandbox.verify import Verdict, Verdicts, Verifier, together

    for case in cases:
        with suppress(UnsupportedError):  # that becomes its verdict
            get_ready(case.config)
    started = time.perf_counter()

    def gathered(verdicts: list[Verdict]) -> Verdicts:
        versions = {engine: version_of(engine) for engine in dict.fromkeys(case.config.engine for case in cases)}
        return Verdicts(versions=versions, cases=verdicts, seconds=time.perf_counter() - started)

    if attached():
        world, timeout = cases[0].config.mesh.world, max(case.config.run.timeout for case in cases)
        work = together, cases, measure
        return gathered(attach(world, *work, timeout=timeout, on_message=lambda _, v: show(gathered(v))))
    verifier, console = Verifier(measure=measure), terminal(stderr=True)
    held, quiet = verifier.verify_all(cases), not console.is_terminal
    verdicts = gathered(list(track(held, "verifying", len(cases), console=console, transient=True, disable=quiet)))
    show(verdicts)
    return verdicts


def _show(verdicts: "Verdicts", json_: Path | None, report: Path | None) -> None:
    from sandbox.report.output import output
    from sandbox.report.tables import show

    show(verdicts, terminal())
    if json_:
        with output(json_) as file:
            file.write_text(verdicts.model_dump_json(indent=1), encoding="utf-8")
    if report:
        from sandbox.report.html import write
        from sandbox.report.picture import pictures

        write(report, verdicts, pictures=pictures(verdicts.cases))
        terminal().print(f"wrote {report}")
