"""The results of engines.py as a table for a terminal, a table for a page, and a figure."""

from pathlib import Path
from typing import Any

from ratios import mark
from rich.table import Table

from sandbox.report.svg import Drawing

CLASSES = {
    "ddp": "everything on every rank",
    "zero1": "optimizer state cut",
    "zero2": "gradients cut as well",
    "zero3": "parameters as well, in ranges",
    "fsdp": "parameters as well, by rows",
}
BEGIN, END = "<!-- written by benchmarks/engines.py -->", "<!-- end -->"
HEADS = [
    "strategy", "engine", "step ms", "native / it", "quartiles", "processor", "sent MB", "at least", "tensors MiB",
    "process MiB",
]  # fmt: skip


def printed(results: dict[str, Any], by: str, bound: float) -> Table:
    """For a terminal; marked where the ratio `by` time or processor is within the bound."""
    table = Table(*HEADS, "", box=None)
    for cell in results["cells"]:
        table.add_row(*_row(cell), mark(cell[by]["middle"] <= bound) if by in cell else "")
    return table


def rewrite(page: Path, results: dict[str, Any]) -> None:
    """Put the table of the results in the place of what is between the two marks in the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text(results)}{END}{rest.partition(END)[2]}", encoding="utf-8")


def text(results: dict[str, Any]) -> str:
    """How it was measured, the table, and where native is behind."""
    training, versions = results["training"], results["versions"]
    lines = [
        f"{results['ranks']} ranks on {results['cores']} cores over gloo, {results['parameters'] / 1e6:.1f} million "
        f"parameters in {training['train']['dtype']}, AdamW, {training['train']['batch']} rows of "
        f"{training['data']['sequence']} tokens a step, {results['rounds']} rounds; load of the machine "
        f"{results['load'][0]} before and {results['load'][1]} after. "
        + ", ".join(f"{name} {number.partition('+')[0]}" for name, number in versions.items())
        + ".",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{' --- |' * len(HEADS)}",
        *(f"| {' | '.join(_row(cell))} |" for cell in results["cells"]),
        "",
        behind(results),
    ]
    return "\n".join(lines) + "\n"


def behind(results: dict[str, Any]) -> str:
    """In words, where native takes longer, or the processor longer, and by how much."""
    said = []
    for kind, word in (("time", "Step time"), ("processor", "Processor time")):
        late = {
            f"{cell['engine']}'s {cell['strategy']}": cell[kind]["middle"] - 1
            for cell in results["cells"]
            if kind in cell and cell[kind]["middle"] > 1
        }
        which = ", ".join(f"{name} by {more:.1%}" for name, more in late.items())
        said.append(f"{word}: native is {f'behind {which}' if late else 'at or ahead of each of them'}.")
    return " ".join(said)


def _row(cell: dict[str, Any]) -> list[str]:
    ratios = ["", "", ""]
    if "time" in cell:
        time = cell["time"]
        ratios = [
            f"{time['middle']:.3f}",
            f"{time['low']:.3f} to {time['high']:.3f}",
            f"{cell['processor']['middle']:.3f}",
        ]
    amounts = [
        _amount(cell[key], unit) for key, unit in (("wire", 1e6), ("sent", 1e6), ("tensors", MIB), ("resident", MIB))
    ]
    return [cell["strategy"], cell["engine"], f"{cell['seconds'] * 1e3:.0f}", *ratios, *amounts]


MIB = 2**20


def _amount(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.1f}" if unit == 1e6 else f"{value / unit:.0f}"


LABEL, PANEL, GAP, ROW = 100, 190, 62, 19


def figure(results: dict[str, Any]) -> str:
    """A line for each strategy and engine: step time as a multiple of native's, bytes sent, and peak memory."""
    drawing, cells = Drawing(), results["cells"]
    drawing.text(0, 14, "Every engine, the same training", "head")
    told = (
        f"{results['ranks']} ranks, {results['parameters'] / 1e6:.1f} million parameters, float32, over gloo on a CPU"
    )
    drawing.text(0, 32, told, "quiet")
    places = [LABEL + number * (PANEL + GAP) for number in range(3)]
    bytes_ = [cell["wire"] or cell["sent"] for cell in cells]
    longest = max(1 / cell["time"]["low"] for cell in cells if "time" in cell)
    most = [longest, max(bytes_), max(cell["resident"] or cell["tensors"] for cell in cells)]
    scales = [PANEL / value for value in most]
    titles = ("step time, native = 1", "MB that a rank sends in a step", "MiB that a rank needs at most")
    for place, title in zip(places, titles, strict=True):
        drawing.text(place, 62, title, "title")
    top = 78.0
    for name in dict.fromkeys(cell["strategy"] for cell in cells):
        group = [cell for cell in cells if cell["strategy"] == name]
        drawing.text(0, top + 11, name, "title")
        drawing.text(0 + 7 * len(name) + 6, top + 11, CLASSES.get(name, ""), "quiet small")
        top += ROW
        bottom = top + ROW * len(group)
        for cell in group:
            _line(drawing, cell, top, places, scales)
            top += ROW
        drawing.line(places[0] + scales[0], bottom - ROW * len(group) - 1, places[0] + scales[0], bottom - 3)
        top += 12
    entries = [
        ("r0", "native"),
        ("r2", "library"),
        ("r1", "library ahead of native"),
        ("all", "with buffers of gloo and Python"),
    ]
    drawing.legend(0, top + 12, entries)
    return drawing.svg("Step time, bytes sent and memory of every engine for the same training")


def _line(drawing: Drawing, cell: dict[str, Any], top: float, places: list[float], scales: list[float]) -> None:
    middle, height = top + ROW / 2 - 1, ROW - 7
    drawing.text(14, middle + 4, cell["engine"])
    ratio = 1 / cell["time"]["middle"] if "time" in cell else 1.0
    kind = "r0" if "time" not in cell else "r2" if ratio >= 1 else "r1"
    drawing.rect(
        places[0], middle - height / 2, ratio * scales[0], height, kind, f"{cell['seconds'] * 1e3:.0f} ms", round_=2
    )
    end = ratio
    if "time" in cell:
        low, end = 1 / cell["time"]["high"], 1 / cell["time"]["low"]
        drawing.line(places[0] + low * scales[0], middle, places[0] + end * scales[0], middle, "arrow")
        drawing.text(places[0] + max(ratio, end) * scales[0] + 6, middle + 4, f"{ratio:.2f}", "quiet small")
    sent = cell["wire"] or cell["sent"]
    drawing.rect(places[1], middle - height / 2, sent * scales[1], height, kind, round_=2)
    drawing.text(places[1] + sent * scales[1] + 6, middle + 4, f"{sent / 1e6:.0f}", "quiet small")
    whole = cell["resident"] or cell["tensors"]
    drawing.rect(places[2], middle - height / 2, whole * scales[2], height, "all", round_=2)
    drawing.rect(places[2], middle - height / 2, cell["tensors"] * scales[2], height, kind, round_=2)
    told = f"{cell['tensors'] / MIB:.0f}"
    drawing.text(places[2] + max(whole, cell["tensors"]) * scales[2] + 6, middle + 4, told, "quiet small")
