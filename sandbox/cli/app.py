"""All commands under one name."""

import typer

from sandbox.cli import checkpoint, config
from sandbox.cli.doctor import doctor
from sandbox.cli.explain import explain, list_
from sandbox.cli.launch import launch
from sandbox.cli.report import report
from sandbox.cli.run import run
from sandbox.cli.verify import faults, verify

__all__ = ["app"]

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
app.command()(run)
app.command()(verify)
app.command("list")(list_)
app.command()(explain)
app.command()(faults)
app.command()(report)
app.command()(launch)
app.command()(doctor)
app.add_typer(config.app, name="config")
app.add_typer(checkpoint.app, name="checkpoint")
