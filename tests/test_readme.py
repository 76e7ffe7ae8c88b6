"""What the README and the docs show is what happens: every command is run, with the output and exit code shown."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SET_UP = ("$ git clone", "$ make")  # blocks that begin so are for the reader alone; see test_targets_exist
EVERY_CONFIG = "$ sandbox verify configs/*"  # takes a minute


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str


def blocks() -> list[Block]:
    texts = [(page, page.read_text(encoding="utf-8")) for page in PAGES]
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for page, text in texts
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def sessions() -> list[Block]:
    return [block for block in blocks() if block.language == "console"]


def marked(block: Block) -> Any:
    quick = block.page.name == "README.md" and not block.text.startswith(EVERY_CONFIG)
    marks = [] if quick else [pytest.mark.pages]
    return pytest.param(block, id=f"{block.page.name}-{block.line}", marks=marks)


def runs(block: Block) -> list[tuple[str, str]]:
    """(command, the output shown), by turn."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not parts[0], "a console block begins with a command"
    pairs = [part.partition("\n") for part in parts[1:]]
    return [(command.replace("\\\n", ""), shown) for command, _, shown in pairs]


def words(text: str) -> str:
    """The text less what differs from run to run: numbers (not those in names), and the room they take."""
    text = re.sub(r"(?<![\w.])[-+]?\d[\d,]*(\.\d+)?(e[-+]\d+)?", "#", text)
    text = re.sub(r"(# min )?# (ms|s)\b", "# s", text)
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


@pytest.fixture
def place(tmp_path: Path, block: Block) -> Path:
    """A copy of the project, with the files that the block's page tells the reader to write."""
    for name in ("sandbox", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for other in blocks():
        if other.page == block.page and (name := re.match(r"# (\S+\.(?:py|yaml|json))\n", other.text)):
            (tmp_path / name[1]).write_text(other.text.removeprefix(name[0]), encoding="utf-8")
    return tmp_path


@pytest.mark.parity
@pytest.mark.timeout(400)
@pytest.mark.parametrize("block", [marked(block) for block in sessions()])
def test_commands_do_what_is_shown(block: Block, place: Path) -> None:
    if block.text.startswith(SET_UP):
        pytest.skip("sets up, and runs this very test")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(place),  # the copy, before the installed one
        "TMPDIR": str(place),  # torchrun leaves a folder behind
    }
    commands = runs(block)
    code = 0
    for (command, shown), (following, _) in zip(commands, [*commands[1:], ("", "")], strict=True):
        if command == "echo $?":
            assert code == int(shown)
            continue
        done = subprocess.run(
            ["bash", "-c", f"exec 2>&1; {command}"],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        code = done.returncode
        assert code == 0 or following == "echo $?", f"{command}\n{done.stdout}"
        pattern = re.escape(words(shown)).replace(re.escape("..."), ".*")
        assert re.fullmatch(pattern, words(done.stdout), re.DOTALL), f"{command}\n{done.stdout}"


@pytest.mark.unit
def test_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {name for page in PAGES for name in re.findall(r"\bmake (\w+)\b`|\$ make (\w+)", page.read_text())}
    targets = set(re.findall(r"^(\w+):.*##", makefile, re.MULTILINE))
    assert {name for pair in named for name in pair if name} <= targets
    assert {"demo", "test"} <= targets


@pytest.mark.unit
def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
