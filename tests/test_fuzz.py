"""Whatever stands in a file: a clear error or a right result, never a traceback, a hang or a file half written.

4,700 mutations, always the same; 20 s of processor time, most of it the 700 of checkpoints. More: thorough/.
"""

from pathlib import Path

import fuzz
import pytest

pytestmark = [pytest.mark.unit, pytest.mark.timeout(600)]  # a disk under load takes its time


def test_mutated_configs(tmp_path: Path) -> None:
    assert 1000 < fuzz.configs(tmp_path, range(2000)) < 2000


def test_mutated_configs_of_libraries(tmp_path: Path) -> None:
    assert 500 < fuzz.library_configs(tmp_path, range(1000)) < 1000


def test_mutated_texts(tmp_path: Path) -> None:
    assert 50 < fuzz.texts(tmp_path, range(500)) < 500


def test_mutated_records(tmp_path: Path) -> None:
    assert 50 < fuzz.records(tmp_path, range(500)) < 500


def test_mutated_checkpoints(tmp_path: Path) -> None:
    assert 440 < fuzz.checkpoints(tmp_path, range(500), forged=False) <= 500


def test_forged_checkpoints(tmp_path: Path) -> None:
    assert 60 < fuzz.checkpoints(tmp_path, range(200), forged=True) < 200
