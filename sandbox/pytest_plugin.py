"""For pytest: the fixture `assert_parity`, and `--parity-report FILE`, a page about all that a session held together.

pytest loads this wherever the sandbox is installed, so torch is imported only where the fixture is used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sandbox.verdict import Verdict

__all__ = ["assert_parity", "pytest_addoption", "pytest_configure"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--parity-report`."""
    group = parser.getgroup("sandbox", "gradients of sharded models")
    group.addoption(
        "--parity-report", type=Path, metavar="FILE", help="write a page about every case of the fixture assert_parity"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect verdicts in the process that speaks to the user."""
    path = config.getoption("--parity-report")
    if path and not hasattr(config, "workerinput"):
        if not path.parent.is_dir():
            raise pytest.UsageError(f"--parity-report {path}: {path.parent} is not a folder.")
        config.pluginmanager.register(_Report(path), "sandbox report")


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Any:
    """`sandbox.testing.assert_parity`; what it finds is in the report of the session too."""
    from sandbox import testing
    from sandbox.errors import ParityError

    def check(*args: Any, **kwargs: Any) -> "Verdict":
        verdict: Verdict | None = None
        try:
            verdict = testing.assert_parity(*args, **kwargs)
        except ParityError as error:
            verdict = error.verdict
            raise
        finally:
            if verdict and request.config.getoption("--parity-report"):
                record_property("parity", verdict.model_copy(update={"name": request.node.name}).model_dump_json())
        return verdict

    return check


class _Report:
    """Verdicts as tests end, from whichever process ran them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.verdicts: list[Verdict] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        from sandbox.verdict import Verdict

        if report.when == "call":
            texts = [text for key, text in report.user_properties if key == "parity"]
            self.verdicts += [Verdict.model_validate_json(str(text)) for text in texts]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        from sandbox.report.html import write
        from sandbox.report.words import summary
        from sandbox.verdict import Verdicts

        verdicts = Verdicts(cases=self.verdicts, seconds=sum(verdict.seconds for verdict in self.verdicts))
        write(self.path, verdicts)
        terminalreporter.write_line(f"{self.path}: {summary(verdicts)}")
