"""Stand-in until the real one lands."""

from contextlib import nullcontext


class Peak:
    bytes = 0

    def __init__(self, *a):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *a):
        pass


Traffic = Timeline = Peak


def held(program, optimizer):
    return {}
