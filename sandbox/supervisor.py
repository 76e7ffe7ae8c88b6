"""A run that outlives its ranks: when one dies, fails or hangs, the world is started again from the last checkpoint.

What would fail alike once more is not tried again: a wrong setting, a damaged checkpoint, a loss that is no number. So
only a WorkerError is answered with a restart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sandbox.config import Config
from sandbox.errors import ConfigError, MeshError, SandboxError, WorkerError
from sandbox.plan import plan

__all__ = ["Supervision", "resized", "smaller", "supervise"]

T = TypeVar("T")


@dataclass(frozen=True)
class Supervision:
    """How often to start again, and on how few ranks.

    `min_ranks` None: the world keeps its size. Else a rank that was lost counts as gone, and the data axis shrinks to
    what the ranks that are left allow. Where none allow it on `min_ranks`, the world stays as it is.
    """

    max_restarts: int = 0
    min_ranks: int | None = None

    def check(self, config: Config) -> None:
        """See that a restart would be of use. Raises ConfigError."""
        world = config.mesh.world
        if self.max_restarts and not config.run.checkpoint_every:
            raise ConfigError(
                "--max-restarts: without checkpoints a restart would begin anew. Set run.checkpoint_every, such as 10."
            )
        if self.min_ranks is not None and not 1 <= self.min_ranks <= world:
            raise ConfigError(f"--min-ranks {self.min_ranks}: the mesh has {world} ranks. Name 1 to {world}.")


def supervise(
    attempt: Callable[[Config], T],
    config: Config,
    how: Supervision,
    on_fault: Callable[[WorkerError, int], None] = lambda error, number: None,
) -> T:
    """Call `attempt(config)` until it returns; after a fault again, if need be with fewer ranks -> its result.

    Each fault is told to `on_fault`, with the number of the restart that follows.

    Raises WorkerError: one more fault than `how.max_restarts`. All other errors are raised as they come.
    """
    for number in range(1, how.max_restarts + 2):
        try:
            return attempt(config)
        except WorkerError as error:
            if number > how.max_restarts:
                raise
            on_fault(error, number)
            if how.min_ranks is not None:
                config = smaller(config, how.min_ranks)
    raise AssertionError("an attempt returns or raises")


def smaller(config: Config, min_ranks: int) -> Config:
    """The same training on the most ranks below its own, at least `min_ranks`; itself if there is no such mesh."""
    for world in range(config.mesh.world - 1, min_ranks - 1, -1):
        try:
            return resized(config, world)
        except SandboxError:
            continue
    return config


def resized(config: Config, world: int) -> Config:
    """The same training on `world` ranks: another degree of dp, the same global batch.

    Backward passes keep about the rows that they had, so that a rank needs no more memory for activations: fewer ranks
    accumulate more microbatches.

    Raises MeshError: no degree of dp makes so many ranks, or the batch or the strategy does not allow it.
    """
    if world == config.mesh.world:
        return config
    dp = config.mesh.dp
    others = config.mesh.world // dp.degree
    degree, left = divmod(world, others)
    if left or not degree:
        near = " or ".join(str(others * n) for n in (degree, degree + 1) if n)
        raise MeshError(
            f"{world} ranks: no mesh.dp.degree makes so many, for the other axes take {others}. Start {near}."
        )
    passes = -(-config.train.microbatches * dp.degree // degree)
    tree = config.model_dump()
    tree["mesh"]["dp"]["degree"] = degree
    tree["train"]["microbatches"] = max(1, min(passes, config.train.batch // degree))
    try:
        changed = Config.model_validate(tree)
        plan(changed)
    except (ValueError, SandboxError) as error:
        raise MeshError(f"{world} ranks: {error}") from None
    return changed
