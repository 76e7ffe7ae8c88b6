"""A call that may never come back: it goes on in a thread of its own, and keeps no process from ending."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

__all__ = ["begun"]

T = TypeVar("T")


def begun(call: Callable[[], T], name: str) -> Future[T]:
    """What will come of `call`, which has begun in a thread of that name."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, name=name, daemon=True).start()
    return future
