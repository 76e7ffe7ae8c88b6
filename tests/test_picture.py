"""Pictures: every part of every tensor is drawn once, work as it is, and those in docs are current."""

import importlib.util
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sandbox.config import Config, load
from sandbox.plan import layouts
from sandbox.report.columns import scores
from sandbox.report.picture import picture
from sandbox.report.tensors import boxes
from sandbox.strategies import context

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"


def config(mesh: dict[str, Any], **sections: Any) -> Config:
    train = {"batch": 8, "microbatches": 2, **sections.pop("train", {})}
    return Config.model_validate({"mesh": mesh, "train": train, **sections})


def titles(drawn: str) -> list[str]:
    return [title.text or "" for title in ElementTree.fromstring(drawn).iter(f"{SVG}title")]


# Parts of tensors


@pytest.mark.parametrize(
    ("shape", "offset", "extent", "span", "expected"),
    [
        ((4, 8), (0, 0), (4, 8), None, [(0, 0, 1, 1)]),
        ((4, 8), (2, 4), (2, 4), None, [(0.5, 0.5, 1, 1)]),
        ((4, 8), (0, 0), (4, 8), (8, 24), [(0, 0.25, 1, 0.75)]),
        ((4, 8), (0, 0), (4, 8), (2, 4), [(0.25, 0, 0.5, 0.25)]),
        ((4, 8), (0, 0), (4, 8), (4, 28), [(0.5, 0, 1, 0.25), (0, 0.25, 1, 0.75), (0, 0.75, 0.5, 1)]),
        ((4, 8), (0, 0), (4, 8), (4, 12), [(0.5, 0, 1, 0.25), (0, 0.25, 0.5, 0.5)]),
        ((4, 8), (0, 4), (4, 4), (2, 4), [(0.75, 0, 1, 0.25)]),
        ((8,), (0,), (8,), (2, 4), [(0.25, 0, 0.5, 1)]),
        ((8,), (0,), (8,), (3, 3), []),
    ],
)
def test_a_piece_is_drawn_where_it_lies(shape: Any, offset: Any, extent: Any, span: Any, expected: Any) -> None:
    assert boxes(shape, offset, extent, span) == expected


@pytest.mark.parametrize(
    "mesh",
    [
        {"dp": {"degree": 3, "strategy": "zero1"}},
        {"dp": {"degree": 3, "strategy": "zero3"}},
        {"dp": {"degree": 4, "strategy": "fsdp", "replicas": 2}},
        {"tp": {"degree": 4}},
        {"pp": {"degree": 2}, "dp": {"degree": 2, "strategy": "fsdp"}, "tp": {"degree": 2}},
    ],
    ids=str,
)
def test_pieces_cover_every_tensor_once(mesh: dict[str, Any]) -> None:
    areas: defaultdict[str, dict[Any, float]] = defaultdict(dict)
    for layout in layouts(config(mesh)):
        for name, lies in layout.items():
            drawn = boxes(lies.shape, lies.offset, lies.size, lies.span)
            areas[name][tuple(drawn)] = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in drawn)
    assert {name: sum(parts.values()) for name, parts in areas.items()} == pytest.approx(dict.fromkeys(areas, 1.0))


# What a picture says


def test_a_picture_tells_who_holds_what() -> None:
    told = titles(picture(config({"tp": {"degree": 4}}, model={"kv_heads": 2})))
    q = "blocks.0.attention.q.weight [64 x 64]: rank"
    assert [text for text in told if text.startswith(q)] == [f"{q} {rank}" for rank in range(4)]
    k = "blocks.0.attention.k.weight [32 x 64]: rank"
    assert [text for text in told if text.startswith(k)] == [f"{k} 0, 1", f"{k} 2, 3"]
    assert "blocks.0.norm1.weight [64]: all ranks" in told


def test_a_picture_of_a_pipeline_has_its_schedule_and_calls_places_by_the_axis() -> None:
    told = titles(picture(config({"pp": {"degree": 2}, "dp": {"degree": 2}})))
    assert "forward, stage 1, microbatch 1" in told
    assert "pp 0 is idle" in told


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_the_scores_of_a_ring_are_counted_and_numbered_by_their_step(order: str) -> None:
    columns = [part.tolist() for part in context.columns(12, 3, order)]
    told = titles(scores(order, columns, steps=True).svg(order))
    work = [int(text.split()[0]) for text in told if text.endswith(" scores")]
    assert sum(work) == 12 * 13 // 2
    assert work == ([26] * 3 if order == "zigzag" else [10, 26, 42])
    assert "rank 2's queries, rank 0's keys: step 2" in told


@pytest.mark.parametrize("kind", ["ring", "gather", "ulysses"])
def test_only_a_ring_has_steps(kind: str) -> None:
    told = titles(picture(config({"cp": {"degree": 2, "kind": kind}})))
    assert any(": step 1" in text for text in told) == (kind == "ring")
    assert any("head 3, columns 0 to" in text for text in told) == (kind == "ulysses")


@pytest.mark.parametrize(("experts", "ep"), [(6, 4), (4, 2), (40, 2)])
def test_tokens_of_every_rank_go_to_the_holder_of_their_expert_and_back(experts: int, ep: int) -> None:
    moe = config({"dp": {"degree": 4}, "ep": {"degree": ep}}, model={"experts": experts})
    told, rank = titles(picture(moe)), "rank" if ep == 4 else "ep"
    holds = [{int(name.split(".")[4]) for name in layout if ".experts." in name} for layout in layouts(moe)[:ep]]
    for source, expert in product(range(ep), range(experts)):
        assert told.count(f"tokens of {rank} {source} for expert {expert}") == 2, "at first and at last"
        (owner,) = (number for number, mine in enumerate(holds) if expert in mine)
        words = f" computes expert {expert} for {rank} {source}"
        assert [text for text in told if text.endswith(words)] == [f"{rank} {owner}{words}"]


def test_a_part_of_a_page_leaves_the_theme_to_the_page() -> None:
    one = config({"dp": {"degree": 2}})
    assert "color-scheme: light dark" in picture(one)
    assert "color-scheme" not in picture(one, alone=False)


# The pictures in docs


def test_the_pictures_in_docs_are_current_and_shown() -> None:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs/draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    page, drawn = (ROOT / "docs/strategies.md").read_text(), draw.drawn()
    assert {path.stem for path in (ROOT / "docs/pictures").iterdir()} == set(drawn)
    for name, text in drawn.items():
        assert (ROOT / f"docs/pictures/{name}.svg").read_text() == text, "make pictures"
        assert ElementTree.fromstring(text).tag == f"{SVG}svg"
        assert f"(pictures/{name}.svg)" in page


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_can_be_drawn(path: Path) -> None:
    ElementTree.fromstring(picture(load(path)))
