"""Moves of whole files and folders, also after a crash between two of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_lora.errors import StorageError
from phi3_lora.storage import replace_folder


def filled(text: str):
    return lambda part: (part / "file").write_text(text)


def failing(part: Path) -> None:
    raise OSError(28, "No space left on device")


def test_an_older_folder_is_replaced(tmp_path: Path) -> None:
    for text in ("old", "new"):
        replace_folder(tmp_path / "a", filled(text))
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_crash_between_the_renames_loses_nothing_when_the_next_save_fails(
    tmp_path: Path,
) -> None:
    replace_folder(tmp_path / "a", filled("whole"))
    (tmp_path / "a").rename(tmp_path / "a.old")
    with pytest.raises(StorageError, match="no space left"):
        replace_folder(tmp_path / "a", failing)
    assert (tmp_path / "a" / "file").read_text() == "whole"
