"""`sandbox verify`, and `sandbox faults`, which shows that it finds what it should."""

from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from sandbox.cli.arguments import Set, read, terminal, version_of, writable
from sandbox.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from sandbox.verify import Case, Verdicts

__all__ = ["faults", "verify"]


def verify(
    configs: Annotated[Optional[list[Path]], typer.Argument(metavar="[CONFIG]...", help="Configs to verify.")] = None,  # noqa: UP045
    set_: Set = None,
    all_: Annotated[bool, typer.Option("--all", help="Every strategy of every engine, by world and option.")] = False,
    only: Annotated[str, typer.Option(metavar="TEXT", help="Of --all, cases whose `engine name` contains this.")] = "",
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
    if dtype not in ("finest", "float64", "float32", "bfloat16", "config"):
        raise ConfigError(f"--dtype {dtype}: is not one of finest, float64, float32, bfloat16, config.")
    writable("--json", json_)
    writable("--report", report)
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
    verdicts = _verify(cases, lambda verdicts: _show(verdicts, json_, report), measure=bool(json_ or report))
    if not all(case.held for case in verdicts.cases):
        raise SystemExit(1)


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
    cases = list(dict.fromkeys(case for fault in chosen for case in (fault.sick(), fault.clean())))
    verdict = dict(zip(cases, _verify(cases).cases, strict=True))
    pairs = [(fault, verdict[fault.sick()], verdict[fault.clean()]) for fault in chosen]
    from sandbox.report.detections import show

    show(terminal(), pairs)
    if not all(fault.caught(sick) and clean.status == "held" for fault, sick, clean in pairs):
        raise SystemExit(1)


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
    from sandbox.report.tables import show

    show(verdicts, terminal())
    if json_:
        json_.write_text(verdicts.model_dump_json(indent=1), encoding="utf-8")
    if report:
        from sandbox.report.html import write
        from sandbox.report.picture import pictures

        write(report, verdicts, pictures=pictures(verdicts.cases))
        terminal().print(f"wrote {report}")
