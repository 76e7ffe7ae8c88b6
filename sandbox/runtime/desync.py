"""Ranks that do not start the same collectives in the same order.

They need not hang: where ranks exchange the wrong tensors of some right size, numbers turn into other numbers. So each
rank notes what it starts, by group, and chains it to all that it started before. Two ranks whose chains differ at the
same count have started something else there or before. A rank that is behind is no desync; it may be on its way.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set

from sandbox.runtime.board import KEPT, Board, Entry, Start, ranks, stalled

__all__ = ["desync", "hang", "uneven"]


def desync(boards: Sequence[Board]) -> str:
    """Say which is the first collective that ranks of a group do not agree on; empty if they agree as far as they are.

    The ranks may be at work meanwhile: what may be half written is read again.
    """
    found = _first(boards)
    if found:
        time.sleep(0.01)
        found = found if _first(boards) == found else ""
    return found


def uneven(boards: Sequence[Board]) -> str:
    """Say which ranks of a group have started fewer collectives than others; empty if all have started as many."""
    for members, started in _groups(boards).items():
        counts = {rank: max(started[rank], default=0) for rank in _ranks(members)}
        if len(set(counts.values())) == 1 or not all(_complete(boards[rank]) or counts[rank] for rank in counts):
            continue
        axis = next(start.axis for starts in started.values() for start in starts.values())
        return f"Collectives started over {axis}: {_told({rank: str(count) for rank, count in counts.items()})}."
    return ""


def hang(
    boards: Sequence[Board],
    entries: Sequence[Entry],
    *,
    returned: Set[int],
    places: Mapping[int, str],
    timeout: float,
    silent: Set[int] = frozenset(),
) -> str:
    """Report a hang as `stalled`, and which collectives differ; `entries` are the boards' last ones by this clock."""
    text = stalled(entries, returned=returned, silent=silent, places=places, timeout=timeout)
    # a silent rank may have got further than was heard of it
    odd = desync(boards) or ("" if silent else uneven(boards))
    return f"{text}\n{odd}" if odd else text


def _first(boards: Sequence[Board]) -> str:
    for started in _groups(boards).values():
        for count in sorted({count for starts in started.values() for count in starts}):
            here = {rank: starts[count] for rank, starts in started.items() if count in starts}
            if len({start.chain for start in here.values()}) > 1:
                return _difference(count, here)
    return ""


def _difference(count: int, here: Mapping[int, Start]) -> str:
    names = {rank: f"{start.name} over {start.axis}" for rank, start in here.items()}
    axis = next(iter(here.values())).axis
    if len(set(names.values())) == 1:  # what differed is not remembered any more
        return f"Ranks disagree on the collectives over {axis}, at number {count} or before: {ranks(sorted(here))}."
    return f"Ranks disagree on collective {count} over {axis}: {_told(names)}."


def _told(values: Mapping[int, str]) -> str:
    """The odd ones last: `ranks 0 and 2 all_reduce of 8 bytes, rank 1 all_gather of 8 bytes`."""
    common = Counter(values.values()).most_common()
    return ", ".join(f"{ranks(sorted(r for r in values if values[r] == value))}: {value}" for value, _ in common)


def _groups(boards: Sequence[Board]) -> dict[int, dict[int, dict[int, Start]]]:
    """Group -> rank -> count -> start."""
    groups: dict[int, dict[int, dict[int, Start]]] = defaultdict(lambda: defaultdict(dict))
    for rank, board in enumerate(boards):
        for start in board.starts():
            groups[start.members][rank][start.count] = start
    return groups


def _complete(board: Board) -> bool:
    """Whether the board remembers all that its rank has started."""
    return len(board.starts()) < KEPT


def _ranks(members: int) -> list[int]:
    return [rank for rank in range(members.bit_length()) if members >> rank & 1]
