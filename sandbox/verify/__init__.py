"""Holding a sharded run against the unsharded one."""

from sandbox.verdict import Verdict, Verdicts
from sandbox.verify.capture import Subject
from sandbox.verify.matrix import matrix
from sandbox.verify.together import together
from sandbox.verify.verifier import Case, Verifier, fixture

__all__ = ["Case", "Subject", "Verdict", "Verdicts", "Verifier", "fixture", "matrix", "together"]
