"""The command line. Exit codes: 0 held or done, 1 mismatch or failed run, 2 bad input, 130 interrupted.

Imports of torch and pydantic stay inside the commands, so that `--help` answers at once.
"""

import sys
from typing import NoReturn

from sandbox.errors import SandboxError

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line; what is the user's to mend is printed without a traceback."""
    from sandbox.cli.app import app
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
