"""The results of engines.py as a table for a terminal, a table for a page, and a figure."""

from pathlib import Path
from typing import Any

from ratios import mark
from rich.table import Table

from sandbox.report.svg import Drawing

MIB = 2**20
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
    return [cell["like"], _label(cell), f"{cell['seconds'] * 1e3:.0f}", *ratios, *amounts]


def _label(cell: dict[str, Any]) -> str:
    """The engine, and the strategy where it goes by another name than native's."""
    return cell["engine"] if cell["strategy"] == cell["like"] else f"{cell['engine']} {cell['strategy']}"


def _amount(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.1f}" if unit == 1e6 else f"{value / unit:.0f}"


LABEL, PANEL, GAP, ROW = 100, 190, 62, 19
PANELS = ("step time, native = 1", "MB that a rank sends in a step", "MiB that a rank needs at most")


def figure(results: dict[str, Any]) -> str:
    """A line for each strategy and engine: step time as a multiple of native's, bytes sent, and peak memory."""
    drawing, cells = Drawing(), results["cells"]
    drawing.text(0, 14, "Every engine, the same training", "head")
    told = f"{results['ranks']} ranks over gloo on a CPU, {results['parameters'] / 1e6:.1f} million parameters, float32"
    drawing.text(0, 32, told, "quiet")
    places = [LABEL + number * (PANEL + GAP) for number in range(len(PANELS))]
    widest = zip(*(_values(cell) for cell in cells), strict=True)
    scales = [PANEL / max(high for _, high in panel) for panel in widest]
    for place, title in zip(places, PANELS, strict=True):
        drawing.text(place, 62, title, "title")
    top = 78.0
    for name in dict.fromkeys(cell["like"] for cell in cells):
        group = [cell for cell in cells if cell["like"] == name]
        drawing.text(0, top + 11, name, "title")
        drawing.text(7 * len(name) + 8, top + 11, CLASSES.get(name, ""), "quiet small")
        top += ROW
        drawing.line(places[0] + scales[0], top - 1, places[0] + scales[0], top + ROW * len(group) - 3)
        for cell in group:
            _line(drawing, cell, group[0], top + ROW / 2 - 1, list(zip(places, scales, strict=True)))
            top += ROW
        top += 12
    entries = {
        "r0": "native",
        "r2": "library",
        "r1": "library, less than native",
        "all": "with buffers of gloo and Python",
    }
    drawing.legend(0, top + 12, entries.items())
    return drawing.svg("Step time, bytes sent and memory of every engine for the same training")


def _line(
    drawing: Drawing, cell: dict[str, Any], native: dict[str, Any], y: float, panels: list[tuple[float, float]]
) -> None:
    """A bar in each panel, with its middle at `y`. A panel: where it begins, and the length of one unit."""
    drawing.text(14, y + 4, _label(cell))
    high, told = ROW - 7, _told(cell)
    for (place, scale), (value, end), (best, _), text_ in zip(
        panels, _values(cell), _values(native), told, strict=True
    ):
        kind = "r0" if cell["engine"] == "native" else "r1" if value < 0.995 * best else "r2"
        if place == panels[-1][0]:
            drawing.rect(place, y - high / 2, end * scale, high, "all", round_=2)
        drawing.rect(place, y - high / 2, value * scale, high, kind, f"{cell['seconds'] * 1e3:.0f} ms a step", round_=2)
        drawing.text(place + end * scale + 6, y + 4, text_, "quiet small")
    if "time" in cell:
        place, scale = panels[0]
        drawing.line(place + scale / cell["time"]["high"], y, place + scale / cell["time"]["low"], y, "arrow")


def _values(cell: dict[str, Any]) -> list[tuple[float, float]]:
    """In each panel how long the bar is, and where all that is drawn of it ends."""
    time = (1 / cell["time"]["middle"], 1 / cell["time"]["low"]) if "time" in cell else (1.0, 1.0)
    sent, tensors = cell["wire"] or cell["sent"], cell["tensors"]
    return [time, (sent, sent), (tensors, max(tensors, cell["resident"] or 0))]


def _told(cell: dict[str, Any]) -> list[str]:
    time = f"{1 / cell['time']['middle']:.2f}" if "time" in cell else ""
    whole = f" of {cell['resident'] / MIB:.0f}" if cell["resident"] else ""
    return [time, f"{(cell['wire'] or cell['sent']) / 1e6:.1f}", f"{cell['tensors'] / MIB:.0f}{whole}"]
