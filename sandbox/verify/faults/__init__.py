"""Bugs that really happened, planted on purpose: each must be caught, its kind named, and its twin must hold."""

from sandbox.verify.faults import (
    amounts,
    compositions,
    context,
    data,
    engines,
    expert,
    pipeline,
    recompute,
    tensor,
    update,
)
from sandbox.verify.faults.planting import FAULTS as PLANTED
from sandbox.verify.faults.planting import Fault

__all__ = [
    "FAULTS",
    "Fault",
    "amounts",
    "compositions",
    "context",
    "data",
    "engines",
    "expert",
    "pipeline",
    "recompute",
    "tensor",
    "update",
]

FAULTS = dict(sorted(PLANTED.items(), key=lambda item: item[1].number))
"""All of them by name, in the order of their numbers."""
