"""A checkpoint of a library's engine holds all that the training needs to go on, under any other engine too."""

from pathlib import Path

import checkpoint_work as work
import pytest
import torch
import world

from sandbox import checkpoint
from sandbox.checkpoint import whole
from sandbox.errors import CheckpointError
from sandbox.plan import preload
from sandbox.runtime import launch, warm


@pytest.fixture(scope="module")
def imported() -> None:
    warm(*preload("deepspeed"), *preload("accelerate"), *preload("fairscale"))


@pytest.mark.parity
@pytest.mark.engines
@pytest.mark.timeout(300)
def test_a_training_goes_on_from_library_to_library(tmp_path: Path, imported: None) -> None:
    errors = work.relay([*work.LIBRARIES, "deepspeed zero2 x 2"], tmp_path, dtype="float32")
    print(errors)
    assert max(errors) < 1e-9
