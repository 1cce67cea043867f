"""Fixtures of the tests of the core. A file's own fixture of the same name wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from tests.tiny import write_rows, write_tokenizer
from tests.unit.streams import ROWS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return ChatTokenizer(folder, vocab_size=264)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Rows that are streamed."""
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own, without anything in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
