"""What holds of the project as a whole: its contracts, its files, its public names."""

import ast
import functools
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sandbox.config import Config, load
from sandbox.plan import plan
from sandbox.verify.faults import FAULTS

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "sandbox").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def files() -> list[Path]:
    """What is in the repository, or would be: nothing that git ignores."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git repository")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# Import contracts


def lint(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("trainer.py", "import sandbox.verify", "Each layer knows only those below it"),
        ("model/loss.py", "import sandbox.mesh", "Each layer knows only those below it"),
        ("runtime/local.py", "import sandbox.config", "Each layer knows only those below it"),
        ("new.py", "", "Each layer knows only those below it"),
        ("strategies/fsdp.py", "import sandbox.strategies.ddp", "Strategies are found by their place"),
        ("trainer.py", "import sandbox.engines.torch.ddp", "Strategies are found by their place"),
        ("config/mesh.py", "import torch", "What is read before a world starts imports no torch"),
        ("report/html.py", "import torch", "Tables, figures and pages are made of records alone"),
        ("model/loss.py", "import torch.distributed", "TID251"),
        ("strategies/ddp.py", "import torch.distributed", "TID251"),
    ],
)
def test_a_forbidden_import_is_caught(tmp_path: Path, module: str, line: str, contract: str) -> None:
    shutil.copytree(ROOT / "sandbox", tmp_path / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "sandbox" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    if contract == "TID251":
        done = lint(tmp_path, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "sandbox")
        found = [f"sandbox/{module}"] if f"sandbox/{module}" in done.stdout and contract in done.stdout else []
    else:
        run = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
        done = lint(tmp_path, "-c", run)
        found = re.findall(rf"{re.escape(contract)}.* BROKEN", " ".join(done.stdout.split()))
    assert done.returncode == 1, done.stdout + done.stderr
    assert found, done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "from sandbox.cli.app import app; from typer.testing import CliRunner; CliRunner().invoke(app, ['--help'])",
        "import sandbox.runtime",
        "import sandbox.config",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{code}\nimport sys; sys.exit('torch' in sys.modules)"], check=False)
    assert done.returncode == 0


# Public names


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_all_has_what_other_modules_import(path: Path) -> None:
    """What is in `__all__` exists, once; and what other modules import from this one is in it.

    A module without `__all__` is used within its folder alone: a strategy, of which the plan takes four known names.
    """
    body = parsed(path).body
    listed = next((node.value for node in body if _assigns(node, "__all__")), None)
    names = ast.literal_eval(listed) if listed else []
    assert len(names) == len(set(names))
    assert set(names) <= {name for node in body for name in _defines(node)}
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    submodules = {other.stem for other in path.parent.iterdir()} if path.name == "__init__.py" else set()
    others = [other for other in MODULES if other != path and (listed or other.parent != path.parent)]
    imported = {name for other in others for name in imports(other).get(module, ())}
    assert imported - submodules <= set(names)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> dict[str | None, set[str]]:
    """The names that a module imports, by the module that it takes them from."""
    found: dict[str | None, set[str]] = {}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)


def _defines(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Assign():
            return [target.id for target in node.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Import() | ast.ImportFrom():
            return [alias.asname or alias.name for alias in node.names]
    return []


# Files


def test_the_files_of_a_project_are_there() -> None:
    names = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", ".ci/run", "docs/hero.png")
    assert not [name for name in names if not (ROOT / name).is_file()]
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    home, folder = str(Path.home()), str(ROOT)
    mine = re.compile("|".join(re.escape(f"{path}/") for path in (home, folder, "/home", "/work", "/Users")))
    texts = {path: path.read_bytes().decode("utf-8", "ignore") for path in files() if path != Path(__file__)}
    assert not [name_of(path) for path, text in texts.items() if mine.search(text)]


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_can_be_planned(path: Path) -> None:
    config = load(path)
    assert isinstance(config, Config)
    axes = {planned.strategy.AXIS for planned in plan(config)}
    assert axes >= {axis for axis in ("pp", "dp", "ep", "cp", "tp") if getattr(config.mesh, axis).degree > 1}
    assert bool(axes) == (config.mesh.world > 1)
    assert path.read_text().startswith(f"# {config.mesh.world} rank"), "its first line says what it is"


def test_the_list_of_faults_is_up_to_date() -> None:
    page = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    assert table_of_faults() in page, f"docs/faults.md should have:\n{table_of_faults()}"
    shown = {line.split()[1] for line in page.splitlines() if line.startswith((" ✓", "✓"))}
    assert shown == set(FAULTS), "paste the output of `sandbox faults`"


def table_of_faults() -> str:
    rows = [
        f"| `{fault.name}` | {' '.join((fault.plant.__doc__ or '').split())} | {fault.kind} "
        f"| [{'/'.join(fault.source.split('/')[3:5])} #{fault.source.split('/')[-1]}]({fault.source}) |"
        for fault in FAULTS.values()
    ]
    return "\n".join(["| fault | what is wrong | kind of cause | reported in |", "| --- | --- | --- | --- |", *rows])


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    lines = script.read_text(encoding="utf-8").splitlines()
    assert {"make test", "make slow", "make cluster"} <= set(lines)
