"""bfloat16: gradients that add up over microbatches do so in float32, whoever adds them."""

from itertools import product
from typing import Any

import pytest
import recompute_work as work
import world

from sandbox.config import Config, Mesh
from sandbox.runtime import launch

pytestmark = pytest.mark.parity

MICROBATCHES = 4


def config(strategy: str, pp: int, sync: str | None = None, *, tied: bool = False) -> Config:
    train = {"dtype": "bfloat16", "batch": 16, "microbatches": MICROBATCHES}
    options = {"mesh": {"sync": sync}} if sync else {}
    found = world.config(strategy, model={"tied": tied}, train=train, **options)
    stages = Mesh.model_validate({"pp": {"degree": pp}}).pp
    return found.model_copy(update={"mesh": found.mesh.model_copy(update={"pp": stages})})


CASES = [
    pytest.param(strategy, pp, sync, tied, id=f"{strategy} pp{pp} {sync or ''}{' tied' if tied else ''}")
    for strategy, pp, sync, tied in [
        *product(("ddp", "zero2", "zero3", "fsdp"), (1, 2), ("each", "last"), [False]),
        *product(["zero1"], (1, 2), [None], [False]),
        *product(("zero3", "fsdp"), [2], [None], [True]),
    ]
]


@pytest.mark.parametrize(("strategy", "pp", "sync", "tied"), CASES)
def test_microbatches_add_up_in_float32(strategy: str, pp: int, sync: str | None, tied: bool) -> None:
    settings = config(strategy, pp, sync, tied=tied)
    for flats in launch(settings.mesh.world, work.reduced, settings, timeout=world.TIMEOUT):
        sizes = [size for _, size, _ in flats]
        for dtype, size, beyond in flats:
            alone = sizes.count(size) % MICROBATCHES == 0
            assert dtype == "torch.float32" or (alone and pp == 1), "only a microbatch by itself may be narrow"
            assert alone or beyond > 0.05, "they were added in bfloat16, and then widened"


@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_gradients_that_add_up_in_bfloat16_would_be_seen(strategy: str) -> None:
    settings = config(strategy, pp=2)
    ranks: list[Any] = launch(4, work.reduced, settings, work.add_up_in_the_dtype_of_compute, timeout=world.TIMEOUT)
    assert all(beyond == 0 for flats in ranks for _, _, beyond in flats)
