"""Expert parallelism to look at: tokens go to the ranks that hold their experts, and what those say comes back."""

from collections.abc import Iterable, Sequence

from sandbox.report.svg import Drawing

__all__ = ["visit"]

LEFT, WIDE, BETWEEN, HIGH = 66, 190, 88, 20

Cell = tuple[int, int, str]
"""Whose tokens, for which expert, and both in words."""


def visit(experts: Sequence[Sequence[int]], rank_is: str = "rank") -> Drawing:
    """A mixture by rank, `experts` of each: its tokens sorted by expert, what its experts have got, its tokens again.

    Drawn as if every rank had as many tokens for every expert. How many they are is up to the router.
    """
    ranks, number = range(len(experts)), sum(map(len, experts))
    drawing, cell = Drawing(), min(26.0, WIDE / max(number, len(experts) * max(map(len, experts))))
    home = [
        [(rank, e, f"tokens of {rank_is} {rank} for expert {e}") for mine in experts for e in mine] for rank in ranks
    ]
    away = [
        [(source, e, f"{rank_is} {rank} computes expert {e} for {rank_is} {source}") for e in mine for source in ranks]
        for rank, mine in enumerate(experts)
    ]
    titles = ("sorted by expert", "at the experts", "back home")
    for panel, (title, rows) in enumerate(zip(titles, (home, away, home), strict=True)):
        left = LEFT + panel * (WIDE + BETWEEN)
        drawing.text(left, 10, title)
        for rank, row in enumerate(rows):
            y = 18.0 + (HIGH + 4) * rank
            if not panel:
                drawing.text(0, y + 14, f"{rank_is} {rank}", "quiet")
            _row(drawing, left, y, cell, row)
        if panel:
            _arrow(drawing, left - BETWEEN / 2, 18 + (HIGH + 4) * len(ranks) / 2)
    return drawing


def _row(drawing: Drawing, left: float, y: float, cell: float, row: Iterable[Cell]) -> None:
    for place, (source, expert, words) in enumerate(row):
        x = left + cell * place
        drawing.rect(x + 0.5, y, cell - 1, HIGH, drawing.held([source], 0), words)
        if cell > 6 * len(str(expert)) + 2:
            drawing.text(x + cell / 2, y + 14, str(expert), "on", "middle")


def _arrow(drawing: Drawing, middle: float, y: float) -> None:
    drawing.text(middle, y - 6, "all_to_all", "quiet small", "middle")
    drawing.line(middle - 28, y, middle + 20, y, "arrow")
    drawing.polygon([(middle + 20, y - 4), (middle + 27, y), (middle + 20, y + 4)], "tip")
