"""Drawings as SVG: shapes one after the other, in colours that follow the reader's theme, light or dark."""

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["RANKS", "Drawing", "stack"]

RANKS = 8
"""Colours for ranks; further ranks begin again with the first."""

STYLE = """\
.picture { --paper: light-dark(#fff, #1b1f26); --ink: light-dark(#1d232c, #e6e8ec);
  --quiet: light-dark(#667080, #949dab);
  --line: light-dark(#e4e2dc, #333a45); --all: light-dark(#d5d8dc, #454c57); --f: light-dark(#3a6fb0, #4f86c6);
  --f2: light-dark(#6d98cd, #35618f); --b: light-dark(#d0693a, #c9703f); --b2: light-dark(#de9570, #8f5335);
  --w: light-dark(#2b978a, #2f9486); --w2: light-dark(#62b0a6, #246a61);
  --r0: light-dark(#3a6fb0, #5b93d3); --r1: light-dark(#d0693a, #d87c4c); --r2: light-dark(#2b978a, #3fa897);
  --r3: light-dark(#dda02f, #cf9a3c); --r4: light-dark(#8d5f93, #ab7db1); --r5: light-dark(#79aedb, #3f6f9f);
  --r6: light-dark(#c9577a, #d6748f); --r7: light-dark(#8a9a3b, #9aa84c);
  font: 12px Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.picture text { fill: var(--ink); }
.picture .quiet { fill: var(--quiet); }
.picture .small { font-size: 10.5px; }
.picture .title { font-weight: 600; }
.picture .head { font-size: 14px; font-weight: 600; }
.picture .on { fill: #fff; font-size: 10.5px; }
.picture .none, .picture .track { fill: none; stroke: var(--line); }
.picture .idle { fill: var(--line); opacity: .55; }
.picture .rule { stroke: var(--line); }
.picture .all { fill: var(--all); }
.picture .arrow { stroke: var(--quiet); stroke-width: 1.5; }
.picture .tip { fill: var(--quiet); }
"""


class Drawing:
    """Shapes, with the size that they need. `kind`s of fill are classes of the style: `r0`, `f`, `all`."""

    def __init__(self) -> None:
        self.width = self.height = 0.0
        self._parts: list[str] = []
        self._stripes: dict[tuple[int, ...], None] = {}

    def rect(
        self, x: float, y: float, width: float, height: float, kind: str, title: str = "", *, round_: float = 0
    ) -> None:
        """A filled rectangle; `title` is told when the pointer rests on it."""
        inner = f"<title>{escape(title)}</title></rect>" if title else "</rect>"
        corner = f' rx="{_n(round_)}"' if round_ else ""
        self._add(
            f'<rect {_fill(kind)} x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"{corner}>{inner}',
            x + width,
            y + height,
        )

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """A line of text with its baseline at `y`."""
        look = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
        wide = len(text) * (8 if "head" in kind else 6.4)
        end = x + wide * {"start": 1, "middle": 0.5, "end": 0}[anchor]
        self._add(f'<text x="{_n(x)}" y="{_n(y)}"{look}>{escape(text)}</text>', end, y + 4)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "rule") -> None:
        """A straight line."""
        self._add(
            f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>', max(x1, x2), max(y1, y2)
        )

    def polygon(self, points: Iterable[tuple[float, float]], kind: str, title: str = "") -> None:
        """A filled polygon."""
        points = list(points)
        told = f"<title>{escape(title)}</title>" if title else ""
        where = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self._add(f'<polygon {_fill(kind)} points="{where}">{told}</polygon>', *map(max, zip(*points, strict=True)))

    def held(self, ranks: Sequence[int], world: int) -> str:
        """The fill for what these ranks hold: a rank's colour, stripes of several, grey of all."""
        if len(ranks) == 1:
            return f"r{ranks[0] % RANKS}"
        if len(ranks) == world:
            return "all"
        self._stripes[tuple(rank % RANKS for rank in ranks)] = None
        return "stripes " + _name(rank % RANKS for rank in ranks)

    def legend(self, x: float, y: float, entries: Iterable[tuple[str, str]]) -> None:
        """Small squares and what their fill stands for: (kind, text) each."""
        for kind, text in entries:
            self.rect(x, y - 9, 10, 10, kind, round_=2)
            self.text(x + 15, y, text, "quiet")
            x += 15 + 6 * len(text) + 16

    def place(self, other: "Drawing", x: float, y: float) -> None:
        """Put another drawing here."""
        inner = "\n".join(other._parts)
        self._stripes |= other._stripes
        self._add(f'<g transform="translate({_n(x)} {_n(y)})">\n{inner}\n</g>', x + other.width, y + other.height)

    def svg(self, label: str, *, alone: bool = True) -> str:
        """The text of the SVG. `alone`: a file of its own, with a ground; else a part of a page, in its theme."""
        margin = 20 if alone else 2
        width, height = self.width + 2 * margin, self.height + 2 * margin
        theme = ":root { color-scheme: light dark; }\n" if alone else ""
        ground = f'<rect width="{_n(width)}" height="{_n(height)}" rx="8" style="fill: var(--paper)"/>' if alone else ""
        stripes = "".join(map(_pattern, self._stripes))
        drawn = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" viewBox="0 0 {_n(width)} {_n(height)}" '
            f'width="{_n(width)}" height="{_n(height)}" role="img" aria-label="{escape(label)}">\n'
            f"<style>\n{theme}{STYLE}{_colours()}</style>\n<defs>{stripes}</defs>\n{ground}"
            f'<g transform="translate({margin} {margin})">\n{drawn}\n</g>\n</svg>\n'
        )

    def _add(self, part: str, right: float, bottom: float) -> None:
        self._parts.append(part)
        self.width, self.height = max(self.width, right), max(self.height, bottom)


def stack(drawings: Sequence[Drawing], gap: float = 28) -> Drawing:
    """One below the other."""
    whole = Drawing()
    top = 0.0
    for drawing in drawings:
        whole.place(drawing, 0, top)
        top += drawing.height + gap
    return whole


def _colours() -> str:
    kinds = [*(f"r{rank}" for rank in range(RANKS)), "f", "f2", "b", "b2", "w", "w2"]
    return "\n".join(f".picture .{kind} {{ fill: var(--{kind}); }}" for kind in kinds) + "\n"


def _fill(kind: str) -> str:
    stripes = kind.removeprefix("stripes ")
    return f'fill="url(#{stripes})"' if stripes != kind else f'class="{kind}"'


def _name(ranks: Iterable[int]) -> str:
    return "ranks-" + "-".join(map(str, ranks))


def _pattern(ranks: tuple[int, ...]) -> str:
    bars = "".join(f'<rect class="r{rank}" x="{4 * i}" width="4" height="8"/>' for i, rank in enumerate(ranks))
    return (
        f'<pattern id="{_name(ranks)}" width="{4 * len(ranks)}" height="8" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)">{bars}</pattern>'
    )


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
