"""Fixtures for tests of whole runs; a fixture of the same name in a test file wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.streams import ROWS
from tests.tiny import write_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write the folder of a tiny random model."""
    return str(write_model(tmp_path_factory.mktemp("inputs") / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write the rows to stream."""
    return write_rows(tmp_path / "rows.jsonl", ROWS)
