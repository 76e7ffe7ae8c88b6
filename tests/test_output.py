"""What is written for the user is whole, or says why not; an older file is not lost to a full disk."""

import errno
import os
import sys
from pathlib import Path

import pytest

from sandbox.errors import SandboxError
from sandbox.report.output import output
from sandbox.run import Log

pytestmark = pytest.mark.unit
FULL = Path("/dev/full")
linux = pytest.mark.skipif(sys.platform != "linux", reason="writes to /dev/full")


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_file_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    file = tmp_path / "made" / "page.html"
    for text in ("old", "new"):
        with output(file) as partial:
            partial.write_text(text)
            assert partial.suffix == file.suffix, "which tells matplotlib the format"
        assert file.read_text() == text
    assert names(file.parent) == ["page.html"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_what_is_not_written_to_its_end_costs_no_older_file(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "page.html"
    file.write_text("old")
    with pytest.raises((SandboxError, KeyboardInterrupt)) as caught, output(file) as partial:
        partial.write_text("half")
        raise error
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"{file}: cannot be written (No space left on device). Make room")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["page.html"]


@linux
def test_a_device_and_a_link_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    with output(tmp_path / "link") as file:
        file.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    with pytest.raises(SandboxError, match="/dev/full: cannot be written"), output(FULL) as file:
        file.write_text("text")
    assert FULL.is_char_device()


@linux
def test_a_run_whose_metrics_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(FULL)
    told = r"metrics.jsonl: cannot be written \(No space left on device\)\. Make room, or name another --folder\."
    with pytest.raises(SandboxError, match=told), Log(tmp_path, 3) as log:
        log.take(0, {"warning": "a text"})
