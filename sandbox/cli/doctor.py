"""`sandbox doctor`: look at everything, then say it."""

import os
from collections.abc import Iterator
from typing import Annotated, Optional

import typer

from sandbox.doctor import network
from sandbox.doctor.finding import Finding
from sandbox.runtime import warm
from sandbox.runtime.network import interfaces

__all__ = ["doctor"]


def doctor(
    host: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Where several nodes will meet; default: only this machine matters."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where a rendezvous would listen.")] = 29500,
) -> None:
    """Say what this machine has and what runs on it, and what is wrong, in words; exit code 1 if something is."""
    from rich.console import Console
    from rich.text import Text

    warm()
    console, wrong = Console(highlight=False), []
    for finding in _look(host, port):
        mark = Text("✗" if finding.wrong else "✓", "bold red" if finding.wrong else "green")
        console.print(Text.assemble(mark, f"  {finding.what:14}  {finding.found}"), soft_wrap=True)
        wrong += [finding.wrong] if finding.wrong else []
    for text in wrong:
        console.print(Text(f"\n{text}"), soft_wrap=True)
    if wrong:
        raise SystemExit(1)


def _look(host: str | None, port: int) -> Iterator[Finding]:
    from sandbox.doctor import examine

    yield examine.versions()
    yield examine.devices()
    yield Finding("interfaces", ", ".join(f"{name} {address}" for name, address in interfaces().items()))
    yield network.host_name(host)
    if host is not None:
        yield network.first_node(host)
    yield network.gloo(os.environ, host)
    yield network.port(port)
    if half := network.environment(os.environ):
        yield half
    yield examine.collectives()
    yield from examine.engine_states()
