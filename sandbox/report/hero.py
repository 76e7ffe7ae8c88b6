"""One wide figure for a README or a slide: the errors of all cases, and what each strategy holds in memory."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox.errors import SandboxError
from sandbox.report import words
from sandbox.report.cases import PARTS, groups, held, representatives
from sandbox.report.output import output
from sandbox.verdict import Verdict, Verdicts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["hero"]

INK, QUIET, LINE, WRONG = "#1d232c", "#667080", "#e4e2dc", "#b93a1e"
COLORS = {"parameters": "#3a6fb0", "gradients": "#d0693a", "optimizer": "#2b978a", "activations": "#c3c7cd"}
ZERO = 3e-20
"""Where an error of zero is drawn, left of the smallest others."""


def hero(path: Path, verdicts: Verdicts) -> None:
    """Draw the figure to `path`, a .png of 1600 x 700 or an .svg.

    Raises SandboxError where matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise SandboxError(
            "The figure needs matplotlib. Install it: pip install 'distributed-training-sandbox[report]'"
        ) from None
    with rc_context({"font.size": 11, "text.color": INK, "svg.hashsalt": "sandbox"}):
        layout = ConstrainedLayoutEngine(w_pad=0.25, h_pad=0.2, wspace=0.04)
        figure = Figure(figsize=(16, 7), dpi=100, facecolor="white", layout=layout)
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
        _errors(left, verdicts.cases)
        _memory(right, verdicts.cases)
        with output(path) as file:
            # No date and no version: the same verdicts give the same file.
            figure.savefig(file, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def _errors(axes: "Axes", cases: Sequence[Verdict]) -> None:
    """One line a strategy and engine, one dot a case; the tolerance of each case as a tick under its dot."""
    rows = groups(case for case in cases if case.status in ("held", "mismatch"))
    drawn = [
        (case, row + 0.5 * ((index + 0.5) / len(group.cases) - 0.5))  # side by side, so that none hides another
        for row, group in enumerate(rows)
        for index, case in enumerate(group.cases)
    ]
    for status, color, marker, size in (("held", COLORS["parameters"], "o", 34), ("mismatch", WRONG, "X", 80)):
        dots = [(_place(words.worst(case.gradients)), y) for case, y in drawn if case.status == status]
        x, y = [x for x, _ in dots], [y for _, y in dots]
        axes.scatter(x, y, s=size, color=color, marker=marker, linewidths=0, label=status if dots else None, zorder=3)
    limits = [(case.tolerance, y) for case, y in drawn if case.tolerance]
    axes.scatter(
        [x for x, _ in limits], [y for _, y in limits], s=70, color=INK, marker="|", linewidths=1.6, label="tolerance"
    )
    axes.set_xscale("log")
    axes.set_xlim(ZERO / 3, 3)
    powers = range(-18, 1, 3)
    axes.set_xticks(
        [ZERO, *(10.0**p for p in powers)], ["0", *(f"$10^{{{p}}}$" for p in powers[:-1]), "1"], minor=False
    )
    axes.minorticks_off()
    _dress(axes, [f"{group.strategy} · {group.engine}" for group in rows])
    count = sum(case.status == "held" for case, _ in drawn)
    title = f"Gradients against the unsharded run: {count} of {len(drawn)} cases held"
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", pad=36)
    axes.set_xlabel("largest error of any gradient, relative", color=QUIET)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, handletextpad=0.3, borderpad=0.2)


def _memory(axes: "Axes", cases: Sequence[Verdict]) -> None:
    """Of every strategy and engine the fullest rank of its largest case."""
    chosen = representatives(cases, lambda case: bool(case.memory))
    fullest = [max(held(case), key=lambda rank: sum(rank.measured.values())) for case in chosen]
    rows = range(len(chosen))
    for side, parts, height in (("measured", PARTS, 0.56), ("predicted", PARTS[:-1], 0.68)):
        starts = [0.0] * len(chosen)
        for part in parts:
            widths = [getattr(rank, side).get(part, 0) / 2**20 for rank in fullest]
            if side == "measured":
                axes.barh(rows, widths, height, starts, color=COLORS[part], label=part)
            else:
                label = "theory" if part == parts[0] else None
                axes.barh(rows, widths, height, starts, fill=False, edgecolor=INK, linewidth=1.1, label=label)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
    _dress(axes, [f"{case.strategy} · {case.engine}" for case in chosen])
    worlds = sorted({case.world for case in chosen})
    ranks = " to ".join(str(world) for world in dict.fromkeys((worlds[0], worlds[-1]))) if worlds else "no"
    axes.set_title(f"Memory on one rank of {ranks}", loc="left", fontsize=15, fontweight="bold", pad=36)
    axes.set_xlabel("MiB", color=QUIET)
    axes.legend(
        loc="lower right",  # grows to the left, over the names of the rows: to the right the figure ends
        bbox_to_anchor=(1.0, 1.0),
        ncols=5,
        frameon=False,
        handletextpad=0.4,
        columnspacing=0.7,
        handlelength=1.1,
        borderpad=0.2,
    )


def _dress(axes: "Axes", rows: Sequence[str]) -> None:
    """Rows from top to bottom, vertical rules, no frame."""
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axes.grid(axis="x", color=LINE)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=QUIET)
    axes.tick_params(axis="y", labelcolor=INK, pad=8)
    axes.spines[:].set_visible(False)


def _place(error: float) -> float:
    """Where an error stands on the axis: NaN with the largest, zero left of the smallest."""
    return 1.0 if math.isnan(error) else min(max(error, ZERO), 1.0)
