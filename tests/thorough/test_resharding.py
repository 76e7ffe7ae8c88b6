"""More of tests/test_checkpoint.py: other orders of layouts, Adam in each, and a save killed at hundreds of places."""

import random
from pathlib import Path

import checkpoint_work as work
import pytest
import torch
import world
from checkpoint_kills import killed_saves

from sandbox import checkpoint
from sandbox.checkpoint import whole
from sandbox.errors import WorkerError
from sandbox.runtime import launch

pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]


@pytest.mark.parametrize("seed", range(3))
def test_a_training_goes_on_through_all_layouts_in_any_order(tmp_path: Path, seed: int) -> None:
    layouts = random.Random(seed).sample(list(work.LAYOUTS), len(work.LAYOUTS))
    assert max(work.relay(layouts, tmp_path)) <= world.EXACT


@pytest.mark.parametrize("layout", work.LAYOUTS)
def test_adams_state_is_the_same_bits_in_every_layout(tmp_path: Path, layout: str) -> None:
    start = tmp_path / "none"
    for number, name in enumerate(("zero1 x 3", layout)):
        config = work.config(name, train={"optimizer": "adamw", "steps": 9})
        again, to = tmp_path / f"{number}-again", tmp_path / f"{number}"
        launch(config.mesh.world, work.leg, config, start, again, to, timeout=world.TIMEOUT)
        start = tmp_path / "0"
    first, loaded = (whole.load(checkpoint.latest(tmp_path / name)) for name in ("0", "1-again"))
    assert first.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in first.items())


def test_a_save_killed_at_hundreds_of_places_leaves_a_good_one(tmp_path: Path) -> None:
    config = world.config(world=1, model={"layers": 1, "width": 8}, train={"optimizer": "adamw"})
    sizes = list(range(0, 100_000, 331))
    ((kills, wrong),) = launch(1, killed_saves, config, tmp_path, sizes, timeout=600)
    assert wrong == []
    assert kills >= 200


@pytest.mark.parametrize("moment", [0, 3, 6, 9])
def test_the_first_rank_killed_in_a_save_beside_the_training_leaves_a_good_one(tmp_path: Path, moment: int) -> None:
    config = work.config("zero1 x 3", train={"steps": 4})
    with pytest.raises(WorkerError, match="rank 0 was killed by signal 9"):
        launch(3, work.killed_in_the_second_save, config, tmp_path, 0, moment, timeout=world.TIMEOUT)
    assert launch(3, work.resume, config, tmp_path, timeout=world.TIMEOUT)[0][0][-1][0] == 4
