"""Cached folders: each is made at its first use and shared by all runs of a user."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from phi3_lora.errors import StorageError
from phi3_lora.storage.atomic import explained

T = TypeVar("T")
Note = Callable[[str], None]


def cache_root() -> Path:
    """Return the folder phi3-lora in XDG_CACHE_HOME; without that variable, in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "phi3-lora"


def found_or_made(
    target: Path,
    find: Callable[[], T | None],
    make: Callable[[], None],
    *,
    waiting: str,
    note: Note,
) -> tuple[T | None, bool]:
    """Find or make a folder of the cache; parallel processes share the work.

    Args:
        target: the folder.
        find: a function that reads the folder; it returns None if it is missing or damaged.
        make: a function that writes the whole folder, or nothing.
        waiting: the message for `note` while another process makes the folder.
        note: a function that receives the message.

    Returns:
        The result of `find`, and True if this call made the folder.

    Raises:
        StorageError: when the cache cannot be written.
    """
    found = find()
    if found is not None:
        return found, False
    try:
        with _locked(target, waiting, note):
            found = find()
            if found is not None:
                return found, False
            make()
    except StorageError as cause:
        raise StorageError(
            f"{cause}; it is kept in {target.parent}: set XDG_CACHE_HOME to a folder with room"
        ) from cause
    return find(), True


@contextlib.contextmanager
def _locked(target: Path, waiting: str, note: Note) -> Iterator[None]:
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(target.name + ".lock"), "w")  # noqa: SIM115
    with lock:
        with explained(target):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note(waiting)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
