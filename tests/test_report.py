"""The report: terminal, page and hero figure, drawn from made-up verdicts that look like real ones.

`python tests/test_report.py FOLDER` writes them all there, to look at.
"""

import json
import math
import random
import re
import struct
import subprocess
import sys
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
from matplotlib.image import imread
from rich.cells import cell_len
from rich.console import Console

from sandbox.errors import ConfigError, SandboxError
from sandbox.report import html, words
from sandbox.report.cases import groups
from sandbox.report.hero import hero
from sandbox.report.links import LinkStep, SlowLink
from sandbox.report.picture import pictures
from sandbox.report.record import RunRecord
from sandbox.report.tables import Report
from sandbox.verdict import Amount, Difference, Measured, Span, Verdict, Verdicts

pytestmark = pytest.mark.unit

WEIGHTS = 105_344  # elements of the model
BYTES = 8 * WEIGHTS
TENSORS = [
    "embedding.weight",
    *(
        f"blocks.{layer}.{name}.weight"
        for layer in range(4)
        for name in ("norm1", "q", "k", "v", "o", "norm2", "gate", "up", "down")
    ),
    "norm.weight",
]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


def sample() -> Verdicts:
    """59 cases: 54 held, 2 mismatches, 1 failed, 2 unsupported, of strategies x engines x worlds."""
    draw = random.Random(0)
    cases = [
        _case(draw, strategy, engine, world, accumulation)
        for strategy in STRATEGIES
        for engine in ("native", "torch")
        if (strategy, engine) not in {("zero1", "torch"), ("zero2", "torch"), ("fsdp", "native")}
        for world in (2, 3, 4, 8)
        for accumulation in (1, 3)
    ]
    _spoil(cases[4], range(0, len(TENSORS)), 4.0, "Every gradient has ratio 4.0000 = dp: summed over dp, not averaged.")
    norms = [i for i, name in enumerate(TENSORS) if "norm" in name]
    _spoil(
        cases[21],
        norms,
        0.5,
        "All are norms in the sequence-parallel region, all with ratio 1/tp, and the replicas agree: summed over tp, "
        "then averaged. They hold partial sums, so the sum alone is right.",
    )
    failed = {"engine": "torch", "mesh": "dp 8", "dtype": "float32", "world": 8, "tolerance": 1e-12}
    reason = "rank 5 did not answer for 60 s; it last entered all_gather dp (step 1, forward, blocks.2)."
    cases.append(Verdict(name="zero3_torch_dp8_hang", strategy="zero3", status="failed", cause=reason, **failed))
    for name, reason in (
        ("zero3_torch_premul", "gloo has no PREMUL_SUM; it needs NCCL."),
        ("zero3_torch_float8", "gloo reduces no float8, and this machine has no GPU."),
    ):
        cases.append(Verdict(name=name, strategy="zero3", status="unsupported", cause=reason, **failed))
    versions = {"sandbox": "0.1.0", "python": "3.11.9", "torch": "2.13.0+cpu", "backend": "gloo", "cores": "2"}
    return Verdicts(versions=versions, cases=cases, seconds=48.3)


def _case(draw: random.Random, strategy: str, engine: str, world: int, accumulation: int) -> Verdict:
    def errors(scale: float) -> list[Difference]:
        found = [
            Difference(tensor=name, error=scale * 10 ** draw.uniform(-1.5, 0.3), ratio=1.0, cos=1.0) for name in TENSORS
        ]
        return sorted(found, key=lambda d: -d.error)

    double = engine == "native" or accumulation == 1
    share = -(-BYTES // world)
    part = (world - 1) * share
    full = {"all_reduce dp": 2 * part}
    sharded = {"all_gather dp": 2 * part, "reduce_scatter dp": part}
    traffic = {
        "ddp": full,
        "zero1": {**full, "all_gather dp": part},
        "zero2": {"reduce_scatter dp": part, "all_gather dp": part},
    }.get(strategy, sharded)
    held = {
        "parameters": BYTES if strategy in ("ddp", "zero1", "zero2") else share,
        "gradients": BYTES if strategy in ("ddp", "zero1") else share,
        "optimizer": BYTES if strategy == "ddp" else share,
    }
    twice = engine == "torch" and strategy != "ddp"
    measured = {name: count * (2 if twice and "scatter" in name else 1) for name, count in traffic.items()}
    losses = [5.59 - 0.2 * step for step in range(3)]
    noise = 1e-16 if double else 2e-8
    return Verdict(
        name=f"{strategy}_{engine}_dp{world}" + (f"_accumulate{accumulation}" if accumulation > 1 else ""),
        engine=engine,
        strategy=strategy,
        mesh=f"dp {world}",
        dtype="float64" if double else "float32",
        world=world,
        status="held",
        tolerance=1e-12 if double else 3e-6,
        loss=draw.choice([0.0, noise * draw.random()]),
        norm=noise,
        gradients=errors(noise * 3),
        parameters=errors(noise),
        seconds=0.2 + 0.1 * world * draw.random(),
        traffic={name: Amount(predicted=[traffic[name]], measured=[measured[name]] * world) for name in traffic},
        memory={name: Amount(predicted=[count], measured=[count] * world) for name, count in held.items()},
        peak=[sum(held.values()) + BYTES + 9_000 * rank for rank in range(world)],
        losses=losses,
        reference_losses=losses,
        timeline=[_timeline(draw, strategy) for _ in range(world)],
    )


def _timeline(draw: random.Random, strategy: str) -> list[Span]:
    spans, now = [], draw.uniform(0, 2e-4)
    backward = 3.1e-3
    for _ in range(4):
        if strategy in ("zero3", "fsdp"):
            spans.append(Span(lane="collective", name="all_gather dp", start=now, end=now + 5e-4, bytes=BYTES // 4))
        now += draw.uniform(5e-4, 9e-4)
    spans.append(Span(lane="compute", name="forward", start=spans[0].start if spans else 1e-4, end=now))
    spans.append(Span(lane="compute", name="backward", start=now, end=now + backward))
    name = "all_reduce dp" if strategy in ("ddp", "zero1") else "reduce_scatter dp"
    for layer in range(4):
        start = now + backward * (layer + 1) / 4.4
        end = start + draw.uniform(3e-4, 7e-4)
        spans.append(Span(lane="collective", name=name, start=start, end=end, bytes=BYTES // 4))
    now = spans[-1].end + 1e-4
    spans.append(Span(lane="compute", name="optimizer", start=now, end=now + 6e-4))
    if strategy in ("zero1", "zero2"):
        spans.append(Span(lane="collective", name="all_gather dp", start=now + 7e-4, end=now + 1.2e-3, bytes=BYTES))
    return spans


def _spoil(case: Verdict, which: range | list[int], ratio: float, cause: str) -> None:
    case.status, case.cause = "mismatch", cause
    names = {TENSORS[i] for i in which}
    spoiled = [
        d.model_copy(update={"error": abs(ratio - 1), "ratio": ratio}) if d.tensor in names else d
        for d in case.gradients
    ]
    case.gradients = sorted(spoiled, key=lambda d: -d.error)
    case.parameters = [d.model_copy(update={"error": 2e-2 * abs(ratio - 1)}) for d in case.parameters]


def runs() -> list[RunRecord]:
    """A run of 300 steps and its unsharded twin."""
    draw = random.Random(1)
    losses = [(step, 2.1 + 3.4 * math.exp(-step / 60) + draw.uniform(-0.06, 0.06)) for step in range(300)]
    return [
        RunRecord(
            name="zero3_dp4",
            engine="native",
            strategy="zero3",
            mesh="dp 4",
            losses=losses,
            reference=losses,
            validation=[(step, losses[step][1] + 0.12) for step in range(49, 300, 50)],
            grad_norm=[(step, 0.4 + 2.2 * math.exp(-step / 25) + draw.uniform(0, 0.2)) for step in range(300)],
            unigram_entropy=3.17,
            tokens_per_second=41_800,
        )
    ]


def links() -> SlowLink:
    """Two hosts at 12.5 MB/s: with all of 0.4 s hidden, with nothing of it; and hierarchy against none."""

    def step(ranks: str, name: str, crossed: float, slow: float, other: str = "") -> LinkStep:
        return LinkStep(
            ranks=ranks,
            name=name,
            sent=7_500_000,
            crossed=crossed,
            least=crossed / 12.5e6,
            slow=slow,
            fast=0.4,
            other=other,
        )

    steps = [
        step("2 x 1", "ddp", 7.5e6, 0.6, "ddp, one bucket"),
        step("2 x 1", "ddp, one bucket", 7.5e6, 1.0),
        step("2 x 2", "hsdp", 7.5e6, 0.8, "fsdp"),
        step("2 x 2", "fsdp", 20e6, 2.0),
    ]
    return SlowLink(rate="100mbit", steps=steps)


def terminal(verdicts: Verdicts, width: int = 140) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(Report(verdicts))
    return capture.get()


def page(folder: Path, verdicts: Verdicts, records: list[RunRecord] | None = None) -> str:
    path = folder / "new" / "report.html"
    html.write(path, verdicts, runs=records or [], links=[links()], when=date(2026, 1, 31))
    return path.read_text(encoding="utf-8")


def one(**changes: object) -> Verdict:
    """A case that holds, changed."""
    draw = random.Random(0)
    return _case(draw, "ddp", "native", 2, 1).model_copy(update=changes)


def wrong(value: float) -> list[Difference]:
    good = [Difference(tensor=f"good{i}", error=0.0, ratio=1.0, cos=1.0) for i in range(3)]
    return [Difference(tensor="bad", error=value, ratio=2.0, cos=0.5), *good]


class Tags(HTMLParser):
    """Checks that every element is closed in order, and notes what may load something."""

    VOID = frozenset({"meta", "link", "input", "line", "path", "circle", "rect", "use", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


class TestTerminal:
    def test_shows_every_case_with_its_mark(self) -> None:
        text = terminal(sample())
        for case in sample().cases:
            assert f"{words.MARKS[case.status]}  {case.name} " in text

    def test_says_what_differs_and_why(self) -> None:
        text = terminal(sample())
        assert "zero1_native_dp4_accumulate3: 9 of 38 gradients differ from the unsharded run" in text
        assert "ratio 0.5000   cos 1.0000" in text
        assert "… and 6 more" in text
        assert "summed over tp, then averaged." in text

    def test_ends_with_a_summary(self) -> None:
        expected = "59 cases: 54 held, 2 mismatches, 1 failed, 2 unsupported, in 48 s"
        assert terminal(sample()).splitlines()[-1] == expected

    @pytest.mark.parametrize("width", [30, 50, 80, 100, 140])
    def test_fits_the_terminal(self, width: int) -> None:
        assert max(cell_len(line) for line in terminal(sample(), width).splitlines()) <= width

    def test_a_narrow_terminal_keeps_names_and_gradient_errors(self) -> None:
        assert "ddp_native_dp2_accumulate3" in terminal(sample(), 50)
        assert "gradients" in terminal(sample(), 50)

    def test_has_colours_on_a_terminal_only(self) -> None:
        assert "\x1b" not in terminal(sample())
        console = Console(width=140, force_terminal=True, color_system="standard", no_color=False)
        with console.capture() as capture:
            console.print(Report(sample()))
        assert "\x1b[" in capture.get()

    def test_takes_names_literally(self) -> None:
        assert "[bold]name" in terminal(Verdicts(cases=[one(name="[bold]name")]))

    def test_nothing_verified_is_no_error(self) -> None:
        assert terminal(Verdicts()).strip() == "0 cases: 0 held, in 0 ms"


class TestWords:
    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"gradients": wrong(1.0)}, "1 of 4 gradients differ from the unsharded run"),
            ({"gradients": wrong(math.nan)}, "1 of 4 gradients differ from the unsharded run"),
            ({"parameters": wrong(1.0)}, "gradients agree, but 1 of 4 parameters differ after 3 steps"),
            ({"norm": 1.0}, "the global gradient norm differs from the unsharded run"),
            ({"loss": math.nan}, "the loss differs from the unsharded run"),
            (
                {"gradients": [Difference(tensor="w", error=0, ratio=1, cos=1, drift=0.1)]},
                "ranks differ in what they hold of the same tensor",
            ),
            ({}, "differs from the unsharded run"),
            ({"status": "failed"}, "did not finish"),
        ],
    )
    def test_headline_names_the_first_thing_that_differs(self, changes: dict[str, object], text: str) -> None:
        assert words.headline(one(**{"status": "mismatch", **changes})) == text

    def test_factor_is_one_only_where_every_rank_is_as_predicted(self) -> None:
        assert words.factor([]) == words.NONE
        assert words.factor([Amount(predicted=[8], measured=[8, 8])]) == "1"
        assert words.factor([Amount(predicted=[8, 10], measured=[10, 8])]) == "1.000"
        assert words.factor([Amount(predicted=[8], measured=[16, 16])]) == "2.000"
        assert words.factor([Amount(predicted=[0], measured=[16])]) == "∞"

    def test_figures_are_short(self) -> None:
        assert [words.size(n) for n in (0, 1023, 1024, 1023 * 1024, 5 * 2**30)] == [
            "0 B",
            "1023 B",
            "1 KiB",
            "1023 KiB",
            "5 GiB",
        ]
        assert [words.duration(s) for s in (0.0031, 0.2, 48.3, 125)] == ["3.1 ms", "0.2 s", "48 s", "2 min 5 s"]
        assert [words.error(e) for e in (0, 5.56e-17, math.nan)] == ["0", "5.6e-17", "nan"]


class TestPage:
    def test_is_well_formed_and_loads_nothing(self, tmp_path: Path) -> None:
        tags = Tags()
        text = page(tmp_path, sample(), runs())
        tags.feed(text)
        assert tags.open == []
        assert not tags.seen & {"script", "img", "iframe", "object"}
        assert all(link.startswith(("#", "data:")) for link in tags.links)
        assert "url(" not in text
        assert "@import" not in text

    def test_names_every_case(self, tmp_path: Path) -> None:
        text = page(tmp_path, sample())
        for case in sample().cases:
            assert f'title="{case.name}">{case.name}<' in text

    def test_shows_what_a_slow_link_does(self, tmp_path: Path) -> None:
        text = " ".join(page(tmp_path, sample()).split())
        assert "send each other 100mbit" in text
        for name, figures in {
            "ddp": "7.15 MiB crossed in 0.6 s at least, 100 % hidden, <b>1.67 x</b> as fast as ddp, one bucket",
            "ddp, one bucket": "7.15 MiB crossed in 0.6 s at least, 0 % hidden",
            "hsdp": "7.15 MiB crossed in 0.6 s at least, 50 % hidden, <b>2.50 x</b> as fast as fsdp",
            "fsdp": "19.1 MiB crossed in 1.6 s at least, 0 % hidden",
        }.items():
            assert f'<span>{name}</span><span class="quiet">{figures}</span>' in text

    def test_escapes_what_it_was_given(self, tmp_path: Path) -> None:
        evil = "<script>alert('&')</script>"
        tensor = Difference(tensor=evil, error=1.0, ratio=1.0, cos=1.0)
        case = one(name=evil, strategy=evil, engine=evil, mesh=evil, dtype=evil, cause=evil, status="mismatch")
        case = case.model_copy(update={"gradients": [tensor], "traffic": {evil: Amount(predicted=[1], measured=[1])}})
        spans = [Span(lane="compute", name=evil, start=0, end=1)]
        case.timeline = [spans]
        run = runs()[0].model_copy(update={"name": evil, "strategy": evil})
        text = page(tmp_path, Verdicts(versions={evil: evil}, cases=[case]), [run])
        assert "<script" not in text
        assert "&lt;script&gt;" in text

    def test_is_the_same_for_the_same_verdicts(self, tmp_path: Path) -> None:
        assert page(tmp_path, sample(), runs()) == page(tmp_path, sample(), runs())

    def test_stays_small_with_many_cases_and_spans(self, tmp_path: Path) -> None:
        busy = [Span(lane="collective", name="all_gather dp", start=i / 1e3, end=i / 1e3 + 5e-4) for i in range(2000)]
        cases = [
            case.model_copy(update={"name": f"{case.name}_{i}", "timeline": [busy] * case.world})
            for case in sample().cases
            for i in range(2)
        ]
        assert len(page(tmp_path, Verdicts(cases=cases))) < 2_000_000

    def test_draws_what_is_not_a_number_as_beyond(self, tmp_path: Path) -> None:
        case = one(status="mismatch", loss=math.nan, gradients=wrong(math.nan), parameters=wrong(math.inf))
        run = RunRecord(name="broken", losses=[(0, 5.0), (1, math.nan), (2, math.inf)], grad_norm=[(0, math.nan)])
        text = page(tmp_path, Verdicts(cases=[case]), [run])
        assert text.count(" beyond") >= 3
        assert "nan%" not in text
        assert "inf%" not in text

    def test_sparse_verdicts_are_no_error(self, tmp_path: Path) -> None:
        bare = Verdict(
            name="bare", engine="native", strategy="ddp", mesh="dp 2", dtype="float64", world=2, status="held"
        )
        assert "How did it train, and at what cost?" in page(tmp_path, Verdicts())
        assert "All held" in page(tmp_path, Verdicts(cases=[bare]))

    def test_several_runs_stand_side_by_side_under_one_legend(self, tmp_path: Path) -> None:
        run = runs()[0]
        alone = page(tmp_path, Verdicts(), [run])
        several = page(tmp_path, Verdicts(), [run, RunRecord(name="plain", losses=[(0, 5.0), (1, 4.0)])])
        assert "<h2>Training zero3_dp4</h2>" in alone
        assert '<div class="runs">' not in alone
        assert "<h2>Training</h2>" in several
        assert several.count('<div class="runs">') == several.count('class="key run"') == 1
        assert re.findall("<h3>(zero3_dp4|plain)</h3>", several) == ["zero3_dp4", "plain"]

    def test_a_run_is_drawn_as_a_case_is_and_instead_of_it(self, tmp_path: Path) -> None:
        case = one()
        seen = {name: getattr(case, name) for name in Measured.model_fields}
        run = runs()[0].model_copy(update={"measured": Measured(**seen)})
        drawings = re.compile("<article.*?</article>|<figure class=.timeline.*?</figure>", re.DOTALL)
        alone = drawings.findall(page(tmp_path, Verdicts(), [run]))
        assert len(alone) == 5, "memory, bytes, timeline, and two of links"
        unnamed = [text.replace(f"{case.name} · ", "") for text in alone]
        assert unnamed == drawings.findall(page(tmp_path, Verdicts(cases=[case])))
        assert alone == drawings.findall(page(tmp_path, Verdicts(cases=[case]), [run]))
        both = drawings.findall(page(tmp_path, Verdicts(cases=[case, one(strategy="zero9")]), [run]))
        assert len(both) == len(alone) + 3

    def test_what_was_not_measured_is_told(self, tmp_path: Path) -> None:
        told = "No memory, bytes and timeline of it"
        assert told in page(tmp_path, Verdicts(), runs())
        seen = {name: getattr(one(), name) for name in Measured.model_fields}
        untimed = Measured(**{**seen, "timeline": [[], []], "unmeasured": ["No clock."]})
        text = page(tmp_path, Verdicts(), [runs()[0].model_copy(update={"measured": untimed})])
        assert told not in text
        assert '<p class="note">No clock.</p>' in text
        assert '<figure class="timeline">' in text

    def test_the_axis_is_monotone_and_bounded(self) -> None:
        places = [float(html._position(e)) for e in (0, 1e-30, 1e-18, 1e-12, 1e-3, 1, 100)]
        assert places == sorted(places)
        assert 0 < places[0] < places[1] == places[2]
        assert places[-2] == places[-1] <= 100

    def test_without_jinja2_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "jinja2", None)
        with pytest.raises(SandboxError, match=r"pip install 'distributed-training-sandbox\[report\]'"):
            page(tmp_path, sample())


class TestHero:
    def test_is_1600_by_700(self, tmp_path: Path) -> None:
        hero(tmp_path / "hero.png", sample())
        header = (tmp_path / "hero.png").read_bytes()[16:24]
        assert struct.unpack(">II", header) == (1600, 700)

    @pytest.mark.parametrize("strategy", ["ddp", "pipeline + tensor + context + fsdp"])
    def test_nothing_is_cut_off_at_an_edge(self, tmp_path: Path, strategy: str) -> None:
        """Long names leave little width to the bars, and less to a legend above them."""
        hero(tmp_path / "hero.png", Verdicts(cases=[*sample().cases, one(strategy=strategy)]))
        pixels = imread(tmp_path / "hero.png")
        pixels[8:-8, 8:-8] = 1
        assert (pixels == 1).all()

    def test_is_the_same_for_the_same_verdicts(self, tmp_path: Path) -> None:
        for name in ("a.svg", "b.svg"):
            hero(tmp_path / name, sample())
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()

    def test_nothing_verified_is_no_error(self, tmp_path: Path) -> None:
        hero(tmp_path / "hero.png", Verdicts())

    def test_without_matplotlib_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(SandboxError, match="matplotlib"):
            hero(tmp_path / "hero.png", sample())


def test_the_page_holds_the_pictures_of_cases_on_most_ranks(tmp_path: Path) -> None:
    def case(world: int, engine: str = "native") -> Verdict:
        settings = {"mesh": {"dp": {"degree": world}}}
        return one(name=f"{engine} {world}", engine=engine, world=world, status="held", config=settings)

    verdicts = Verdicts(cases=[case(2), case(4), case(8, "torch"), one(name="old", strategy="none")])
    found = pictures(verdicts.cases)
    assert [drawn.name for drawn, _ in found] == ["native 4"]
    html.write(tmp_path / "page.html", verdicts, pictures=found)
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="picture"') == 1
    assert "blocks.0.norm1.weight [64]: all ranks" in page


def test_of_many_compositions_those_of_as_many_axes_share_a_line() -> None:
    few = [one(strategy=name, mesh="pp 2, dp 2") for name in ("pipeline + ddp", "pipeline + fsdp")]
    assert [group.strategy for group in groups(few)] == ["pipeline + ddp", "pipeline + fsdp"]
    many = [one(strategy=f"s{n} + t", mesh="pp 2, dp 2x2, tp 2" if n % 2 else "pp 2, dp 2") for n in range(30)]
    found = groups([one(strategy="ddp", mesh="dp 2"), *many])
    assert [(group.strategy, len(group.cases)) for group in found] == [("ddp", 1), ("2 axes", 15), ("3 axes", 15)]


def test_importing_the_report_imports_no_drawing_library() -> None:
    code = "import sys, sandbox.report.html, sandbox.report.hero, sandbox.report.tables; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"jinja2", "matplotlib", "torch"} & set(names)


class TestRunRecord:
    HEAD: ClassVar = {
        "run": {"name": "r", "engine": "native", "strategy": "ddp", "mesh": "dp 2", "unigram_entropy": 3.1}
    }

    def lines(self) -> list[dict[str, object]]:
        steps = [
            {"step": i, "loss": 5.0 - i, "grad_norm": 1.0, "lr": 0.1, "tokens_per_second": 10.0 * i} for i in range(3)
        ]
        return [self.HEAD, *steps, {"step": 2, "validation_loss": 3.5, "bits_per_byte": 5.0}]

    def folder(self, path: Path, text: str) -> Path:
        path.mkdir(exist_ok=True)
        (path / "metrics.jsonl").write_text(text, encoding="utf-8")
        return path

    def text(self) -> str:
        return "".join(json.dumps(line) + "\n" for line in self.lines())

    def test_reads_a_run(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, self.text())
        run = RunRecord.read(folder, reference=folder)
        assert (run.name, run.mesh, run.unigram_entropy, run.tokens_per_second) == ("r", "dp 2", 3.1, 10.0)
        assert run.losses == run.reference == [(0, 5.0), (1, 4.0), (2, 3.0)]
        assert run.validation == [(2, 3.5)]
        assert run.grad_norm == [(0, 1.0), (1, 1.0), (2, 1.0)]

    def test_ignores_a_last_line_cut_off_anywhere(self, tmp_path: Path) -> None:
        whole = self.text().encode()
        last = whole.rstrip().rindex(b"\n") + 1
        for end in range(last, len(whole) - 2):
            (tmp_path / "metrics.jsonl").write_bytes(whole[:end])
            run = RunRecord.read(tmp_path)
            assert len(run.losses) == 3
            assert run.validation == []

    def test_the_last_word_on_a_step_counts(self, tmp_path: Path) -> None:
        again = self.text() + json.dumps({"step": 1, "loss": 4.5}) + "\n"
        assert RunRecord.read(self.folder(tmp_path, again)).losses == [(0, 5.0), (1, 4.5), (2, 3.0)]

    def test_the_newest_measurement_counts(self, tmp_path: Path) -> None:
        seen = {"name": "r", "engine": "native", "strategy": "ddp", "dtype": "float32"}
        lines = [{"step": w, "measured": {**seen, "mesh": f"dp {w}", "world": w}} for w in (4, 3)]
        text = self.text() + "".join(json.dumps(line) + "\n" for line in lines)
        measured = RunRecord.read(self.folder(tmp_path, text)).measured
        assert measured
        assert (measured.mesh, measured.world) == ("dp 3", 3)
        with pytest.raises(ConfigError, match="is not what a run writes"):
            RunRecord.read(self.folder(tmp_path, text + json.dumps({"measured": {"world": 2}}) + "\n"))

    def test_a_damaged_file_is_the_users_to_know(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="line 1 is not JSON"):
            RunRecord.read(self.folder(tmp_path, "{\n" + self.text()))

    def test_an_absent_file_is_the_users_to_know(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be read"):
            RunRecord.read(tmp_path)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    html.write(out / "report.html", sample(), runs=runs(), links=[links()])
    hero(out / "hero.png", sample())
    hero(out / "hero.svg", sample())
    Console().print(Report(sample()))
