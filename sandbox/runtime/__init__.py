"""Processes: a world of ranks on this machine, or one rank of a world that torchrun made. Importing it is cheap."""

from sandbox.runtime.board import Board
from sandbox.runtime.elastic import attach, attached, started
from sandbox.runtime.local import launch, warm
from sandbox.runtime.member import Member, leave

__all__ = ["Board", "Member", "attach", "attached", "launch", "leave", "started", "warm"]
