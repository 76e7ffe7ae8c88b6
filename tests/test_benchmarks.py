"""The scripts of benchmarks/: each explains itself, and the table and the figure of the docs are those of a run."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sandbox.config import Config
from sandbox.plan import engines, find, predict, strategies

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
unit = pytest.mark.unit


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / f"{script}.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/, where the scripts themselves find it."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def found(name: str) -> ModuleType:
        return importlib.import_module(name)

    return found


@unit
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_teaches(path: Path) -> None:
    done = run(path.stem, "--help")
    assert done.returncode == 0, done.stderr
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert told
    assert told in done.stdout
    assert "Run" in told
    assert "Exit code 1: " in told
    assert "(default: " in done.stdout


@unit
def test_every_script_is_on_the_page() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert {path.stem for path in SCRIPTS} == {
        line.split("`")[1][:-3] for line in page.splitlines() if ".py` | " in line
    }


@unit
def test_a_ratio_is_of_times_in_the_same_round(module: Any) -> None:
    ratio = module("ratios").Ratio.of([1.0, 20.0, 3.0, 4.0, 10.0], [2.0, 40.0, 6.0, 4.0, 10.0])
    assert (ratio.low, ratio.middle, ratio.high) == (0.5, 0.5, 1.0)
    assert ratio.quartiles(digits=1) == "0.5 to 1.0"


@unit
@pytest.mark.parametrize(("above", "rounds", "exceeds"), [(14, 20, False), (15, 20, True), (5, 5, False), (6, 6, True)])
def test_a_ratio_exceeds_its_bound_when_chance_does_not_explain_it(
    module: Any, above: int, rounds: int, exceeds: bool
) -> None:
    ours = [2.02] * above + [1.98] * (rounds - above)  # of 20 coins 14 or more are heads in 5.8 %, 15 or more in 2.1 %
    assert module("ratios").exceeds(ours, [2.0] * rounds, 1.00) is exceeds
    assert not module("ratios").exceeds(ours, [2.0] * rounds, 1.01), "on the bound is within it"


@unit
@pytest.mark.parametrize("good", [True, False])
def test_a_benchmark_ends_with_its_results_and_its_verdict(module: Any, tmp_path: Path, good: bool) -> None:
    with pytest.raises(SystemExit) as caught:
        module("ratios").end(good, [1, 2], tmp_path / "new/results.json")
    assert caught.value.code == (not good)
    assert json.loads((tmp_path / "new/results.json").read_text()) == [1, 2]


# Every engine, the same training


def results() -> Any:
    return json.loads((ROOT / "docs/engines.json").read_text(encoding="utf-8"))


def cells() -> set[tuple[str, str]]:
    return {(e, name) for e in engines() for name in strategies(e) if find(e, name).AXIS == "dp"}


@unit
def test_the_docs_show_every_engine(module: Any) -> None:
    assert {(cell["engine"], cell["strategy"]) for cell in results()["cells"]} == cells()
    assert set(module("engines_page").CLASSES) >= {name for _, name in cells()}


@unit
def test_the_page_and_the_figure_are_those_of_the_results(module: Any) -> None:
    page = module("engines_page")
    again = f"`{' '.join(COMMAND)}`"
    assert page.text(results()) in (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8"), again
    assert page.figure(results()) == (ROOT / "docs/engines.svg").read_text(encoding="utf-8"), again


COMMAND = (
    "python", "benchmarks/engines.py", "--again", "docs/engines.json", "--page", "docs/benchmarks.md",
    "--figure", "docs/engines.svg",
)  # fmt: skip


@unit
def test_what_is_behind_is_said_with_how_much(module: Any) -> None:
    page, found = module("engines_page"), results()
    for cell in found["cells"]:
        for kind in ("time", "processor"):
            if kind in cell:
                cell[kind] = {"low": 0.8, "middle": 0.9, "high": 1.2}
    assert page.behind(found) == (
        "Step time: native is at or ahead of each of them. Processor time: native is at or ahead of each of them."
    )
    late = next(cell for cell in found["cells"] if (cell["engine"], cell["strategy"]) == ("torch", "fsdp"))
    late["time"]["middle"] = 1.034
    assert page.behind(found).startswith(
        "Step time: native is behind torch's fsdp by 3.4%. Processor time: native is at"
    )


@unit
def test_a_page_is_rewritten_between_its_marks_only(module: Any, tmp_path: Path) -> None:
    page, file = module("engines_page"), tmp_path / "page.md"
    file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        page.rewrite(file, results())
        assert file.read_text() == f"before\n{page.BEGIN}\n{page.text(results())}{page.END}\nafter\n"


TINY = ("--layers", "1", "--width", "64", "--rows", "1", "--rounds", "2", "--laps", "1", "--strategies", "zero1")


@pytest.mark.parity
@pytest.mark.engines
@pytest.mark.timeout(400)
def test_engines_are_measured_side_by_side_and_held_to_the_bound(tmp_path: Path) -> None:
    file = tmp_path / "engines.json"
    done = run("engines", *TINY, "--bound", "1000", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["ranks"], found["rounds"]) == (2, 2)
    assert set(found["versions"]) >= {"torch", "deepspeed", "accelerate", "fairscale"}
    assert {(cell["engine"], cell["strategy"]) for cell in found["cells"]} == {c for c in cells() if c[1] == "zero1"}
    for cell in found["cells"]:
        assert_is_a_measurement(cell, found["training"])
    again = run("engines", "--again", str(file), "--bound", "0.001", "--figure", str(tmp_path / "figure.svg"))
    assert again.returncode == 1, "no ratio is a thousandth"
    assert again.stdout.count("✗") == len(found["cells"]) - 1
    assert (tmp_path / "figure.svg").read_text().startswith("<svg")


def assert_is_a_measurement(cell: dict[str, Any], training: dict[str, Any]) -> None:
    assert cell["seconds"] > 0
    assert ("time" in cell) == ("processor" in cell) == (cell["engine"] != "native")
    for ratio in (cell[kind] for kind in ("time", "processor") if kind in cell):
        assert 0 < ratio["low"] <= ratio["middle"] <= ratio["high"]
    mesh = {"dp": {"degree": 2, "strategy": cell["strategy"]}}
    config = Config.model_validate({**training, "engine": cell["engine"], "mesh": mesh})
    ranks = predict(config)
    assert cell["sent"] == pytest.approx(sum(sum(rank.traffic.values()) for rank in ranks) / len(ranks))
    if cell["wire"] is not None:
        assert cell["sent"] < cell["wire"] < 3 * cell["sent"]
    assert cell["tensors"] >= max(sum(rank.memory.values()) for rank in ranks)
    assert cell["resident"] is None or cell["resident"] > 0
