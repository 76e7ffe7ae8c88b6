"""Bugs that really happened, planted on purpose: each must be caught, its kind named, and its twin must hold."""

from sandbox.verify.faults import context, data, pipeline, tensor
from sandbox.verify.faults.planting import FAULTS, Fault

__all__ = ["FAULTS", "Fault", "context", "data", "pipeline", "tensor"]
