"""Context parallelism to look at: who holds which columns, who works when on which part of the causal scores."""

from collections.abc import Sequence

from sandbox.report.svg import Drawing

__all__ = ["exchange", "scores", "strips", "travel"]

SIDE, LEFT = 250, 66

Columns = Sequence[Sequence[int]]
"""By rank, the columns that it holds."""


def strips(orders: dict[str, Columns], rank_is: str = "rank") -> Drawing:
    """The sequence from left to right, by order; each run of columns in the colour of its rank."""
    drawing = Drawing()
    for number, (order, columns) in enumerate(orders.items()):
        y, total = 18.0 * number, sum(map(len, columns))
        drawing.text(0, y + 13, order, "quiet")
        for start, stop, rank in _runs(columns):
            x, wide = 120 + 560 * start / total, 560 * (stop - start) / total
            words = f"{rank_is} {rank} holds columns {start} to {stop - 1}"
            drawing.rect(x + 0.5, y + 2, wide - 1, 13, drawing.held([rank], 0), words)
            drawing.text(x + wide / 2, y + 12.5, str(rank), "on", "middle")
    return drawing


def scores(order: str, columns: Columns, *, steps: bool, rank_is: str = "rank") -> Drawing:
    """The scores of queries (downwards) and keys: whose work they are; `steps`: and in which step of the ring.

    Above the diagonal nothing is seen. Below: how many scores each rank computes.
    """
    drawing, runs = Drawing(), _runs(columns)
    total, ranks = sum(map(len, columns)), len(columns)
    drawing.text(LEFT, 10, order)
    drawing.text(LEFT + SIDE, 10, "keys", "quiet small", "end")
    drawing.text(LEFT - 6, 30, "queries", "quiet small", "end")
    drawing.rect(LEFT, 18, SIDE, SIDE, "track")
    for q_start, q_stop, rank in runs:
        for k_start, k_stop, source in runs:
            if k_start >= q_stop:
                continue
            x0, x1, y0, y1 = (SIDE * c / total for c in (k_start, k_stop, q_start, q_stop))
            x0, x1, y0, y1 = LEFT + x0 + 0.5, LEFT + x1 - 0.5, 18 + y0 + 0.5, 18 + y1 - 0.5
            step = (rank - source) % ranks
            words = f"{rank_is} {rank}'s queries, {rank_is} {source}'s keys" + (f": step {step}" if steps else "")
            full = k_stop <= q_start
            points = [(x0, y0), (x1, y1), (x0, y1)] if not full else [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
            drawing.polygon(points, drawing.held([rank], 0), words)
            if steps and min(x1 - x0, y1 - y0) > 12:
                middle = (x0 + x1) / 2 if full else x0 + (x1 - x0) / 3
                drawing.text(middle, (y0 + y1) / 2 + (4 if full else (y1 - y0) / 6 + 3), str(step), "on", "middle")
    work = [sum(1 + column for column in mine) for mine in columns]
    for rank, count in enumerate(work):
        y = SIDE + 30 + 16 * rank
        drawing.text(LEFT - 6, y + 9, f"{rank_is} {rank}", "quiet small", "end")
        drawing.rect(LEFT, y, (SIDE - 60) * count / max(work), 10, drawing.held([rank], 0), f"{count:,} scores")
        drawing.text(LEFT + (SIDE - 60) * count / max(work) + 6, y + 9, f"{count:,}", "quiet small")
    return drawing


def travel(ranks: int, rank_is: str = "rank") -> Drawing:
    """By step of a ring: whose keys and values each rank computes with."""
    drawing = Drawing()
    for step in range(ranks):
        x = LEFT + 22 + 92 * step
        drawing.text(x + 30, 10, f"step {step}", "quiet small", "middle")
        for rank in range(ranks):
            y, source = 18 + 24 * rank, (rank - step) % ranks
            if not step:
                drawing.text(0, y + 14, f"{rank_is} {rank}", "quiet")
            drawing.rect(
                x, y, 60, 20, drawing.held([source], 0), f"{rank_is} {rank} has the block of {rank_is} {source}"
            )
            drawing.text(x + 30, y + 14, str(source), "on", "middle")
            if step < ranks - 1:
                below = y + 24 if rank < ranks - 1 else 18
                drawing.line(x + 62, y + 10, x + 90, below + 10, "arrow")
    return drawing


def exchange(columns: Columns, heads: int, rank_is: str = "rank") -> Drawing:
    """Ulysses: outside attention a rank has all heads of its columns, inside all columns of its heads."""
    drawing, total, ranks = Drawing(), sum(map(len, columns)), len(columns)
    runs = _runs(columns)
    wide, high = 250, max(96, 14 * heads)
    for number, title in enumerate(("outside of attention", "in attention")):
        left = LEFT + 22 + number * (wide + 130)
        drawing.text(left, 10, title)
        drawing.text(left - 6, 30, "heads", "quiet small", "end")
        drawing.text(left + wide, 10, "columns", "quiet small", "end")
        for head in range(heads):
            y, each = 18 + high * head / heads, high / heads
            for start, stop, rank in runs if not number else [(0, total, head * ranks // heads)]:
                x, long = left + wide * start / total, wide * (stop - start) / total
                words = f"{rank_is} {rank}: head {head}, columns {start} to {stop - 1}"
                drawing.rect(x + 0.5, y + 0.5, long - 1, each - 1, drawing.held([rank], 0), words)
    middle, y = LEFT + 22 + wide + 50, 18 + high / 2
    drawing.text(middle, y - 6, "all_to_all", "quiet small", "middle")
    drawing.line(middle - 32, y, middle + 30, y, "arrow")
    drawing.polygon([(middle + 30, y - 4), (middle + 37, y), (middle + 30, y + 4)], "tip")
    return drawing


def _runs(columns: Columns) -> list[tuple[int, int, int]]:
    """Columns that follow one another and are one rank's: (start, stop, rank), in order."""
    owner = {column: rank for rank, mine in enumerate(columns) for column in mine}
    runs: list[tuple[int, int, int]] = []
    for column in sorted(owner):
        if runs and runs[-1][1:] == (column, owner[column]):
            runs[-1] = (runs[-1][0], column + 1, owner[column])
        else:
            runs.append((column, column + 1, owner[column]))
    return runs
