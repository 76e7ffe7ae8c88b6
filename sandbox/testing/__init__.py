"""Hold your own model, sharded, against itself in one process: `assert_parity`."""

from sandbox.testing.own import OwnModel
from sandbox.testing.parity import assert_parity

__all__ = ["OwnModel", "assert_parity"]
