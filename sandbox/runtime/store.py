"""Where the ranks of one machine meet before they have connections: keys and values in a file."""

import time
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError

__all__ = ["EagerStore"]

NAPS = 0.5e-3, 10e-3
"""Seconds from one look for a key to the next: at first, and at most, for each nap is twice the one before."""


class EagerStore(Store):
    """A store that soon sees a key which is not there yet. torch's FileStore, which it is made of, naps 10 ms first.

    Gloo waits so for the addresses of the others, whenever a group is made: as long as it takes to make it. Keep it as
    long as there are groups, for torch keeps only the half of it that is in C++.
    """

    timeout: timedelta

    def __init__(self, store: Any) -> None:
        super().__init__()
        self._store = store
        self.set_timeout(store.timeout)

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value for all to read."""
        self._store.set(key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to a number -> the sum."""
        return int(self._store.add(key, amount))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return bool(self._store.check(keys))

    def get(self, key: str) -> bytes:
        """The value of a key, once it is there."""
        self.wait([key])
        return bytes(self._store.get(key))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return when all keys are there. Raises DistStoreError after `timeout`, or the store's own."""
        nap, longest = NAPS
        end = time.monotonic() + (timeout or self.timeout).total_seconds()
        while not self._store.check(keys):
            if time.monotonic() > end:
                raise DistStoreError(f"waited in vain for another rank to write {', '.join(keys)}")
            time.sleep(nap)
            nap = min(2 * nap, longest)
