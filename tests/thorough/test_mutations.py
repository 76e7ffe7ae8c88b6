"""As tests/test_fuzz.py, with other mutations, nine thousand of them."""

from pathlib import Path

import fuzz
import pytest

pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]


def test_mutated_configs(tmp_path: Path) -> None:
    assert 2000 < fuzz.configs(tmp_path, range(2000, 6000)) < 4000


def test_mutated_texts(tmp_path: Path) -> None:
    assert 100 < fuzz.texts(tmp_path, range(1000, 2000)) < 1000


def test_mutated_records(tmp_path: Path) -> None:
    assert 100 < fuzz.records(tmp_path, range(1000, 2000)) < 1000


def test_mutated_checkpoints(tmp_path: Path) -> None:
    assert 1300 < fuzz.checkpoints(tmp_path, range(1000, 2500), forged=False) <= 1500


def test_forged_checkpoints(tmp_path: Path) -> None:
    assert 600 < fuzz.checkpoints(tmp_path, range(200, 2000), forged=True) < 1800
