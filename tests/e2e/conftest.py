"""Fixtures of the tests of whole runs. A file's own fixture of the same name wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.streams import ROWS
from tests.tiny import write_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random model."""
    return str(write_model(tmp_path_factory.mktemp("inputs") / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows that are streamed."""
    return write_rows(tmp_path / "rows.jsonl", ROWS)
