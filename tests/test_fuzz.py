"""Whatever stands in a file: a clear error or a right result, never a traceback, a hang or a file half written."""

from pathlib import Path

import fuzz
import pytest

pytestmark = pytest.mark.unit


def test_mutated_configs(tmp_path: Path) -> None:
    assert 100 < fuzz.configs(tmp_path, range(200)) < 200


def test_mutated_configs_of_libraries(tmp_path: Path) -> None:
    assert 100 < fuzz.library_configs(tmp_path, range(200)) < 200


def test_mutated_texts(tmp_path: Path) -> None:
    assert 10 < fuzz.texts(tmp_path, range(100)) < 100


def test_mutated_records(tmp_path: Path) -> None:
    assert 10 < fuzz.records(tmp_path, range(100)) < 100


def test_mutated_checkpoints(tmp_path: Path) -> None:
    assert 90 < fuzz.checkpoints(tmp_path, range(100), forged=False) <= 100


def test_forged_checkpoints(tmp_path: Path) -> None:
    assert 30 < fuzz.checkpoints(tmp_path, range(100), forged=True) < 100
