"""Atomic writes of files and folders, also after a crash between two renames."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_lora.errors import DataError, StorageError
from phi3_lora.storage.atomic import check_folder_unused, replace_folder, replacing


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
    (tmp_path / "a").rename(tmp_path / ".a.phi3-lora-old")
    with pytest.raises(StorageError, match="no space left"):
        replace_folder(tmp_path / "a", failing)
    assert (tmp_path / "a" / "file").read_text() == "whole"


def test_a_folder_of_the_users_with_a_like_name_is_left_alone(tmp_path: Path) -> None:
    for name in ("x.part", "x.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    replace_folder(tmp_path / "x", lambda part: (part / "a").write_text("1"))
    assert (tmp_path / "x/a").exists()
    assert (tmp_path / "x.part/thesis.txt").exists() and (tmp_path / "x.old/thesis.txt").exists()


def test_two_writers_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    def fill(part: Path) -> None:
        (part / "a").write_text("1")
        with pytest.raises(StorageError, match="another process is writing"):
            replace_folder(tmp_path / "x", lambda other: None)

    replace_folder(tmp_path / "x", fill)
    assert (tmp_path / "x/a").read_text() == "1"
    # No process holds the lock of a folder that a crash left.
    (tmp_path / ".x.phi3-lora-part").mkdir()
    replace_folder(tmp_path / "x", lambda part: (part / "b").write_text("2"))
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["b"]


def test_a_file_is_replaced_in_one_move(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_a_file_that_cannot_be_written_keeps_its_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("old")
    with pytest.raises(StorageError, match="no space left"), replacing(path) as part:
        part.write_text("half")
        failing(part)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_a_folder_that_holds_something_is_refused_in_the_callers_words(tmp_path: Path) -> None:
    check_folder_unused(tmp_path / "new", DataError, "is in use")
    check_folder_unused(tmp_path, DataError, "is in use")
    (tmp_path / "file").touch()
    for used in (tmp_path, tmp_path / "file"):
        with pytest.raises(DataError, match=f"{used.name} is in use"):
            check_folder_unused(used, DataError, "is in use")
