"""Atomic writes: after a crash, a signal or a full disk, the old or the new state is there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from phi3_lora.errors import Phi3LoraError, StorageError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError of a write to a path into a StorageError with a remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as cause:
        if cause.errno in _NO_SPACE:
            message = (
                f"no space left while writing {path}: free some space and run again (train: with "
                "--resume; what was saved before is whole)"
            )
        else:
            message = f"cannot write {path}: {cause.strerror or cause}"
        raise StorageError(message) from cause


def fsync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk; other processes may see a part of it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file in one move: readers see the old or the new content.

    Args:
        path: the final name.

    Yields:
        The name to write to. The caller flushes the content to the disk.

    Raises:
        StorageError: when the file cannot be written; the old content stays.
    """
    # No user's file has this name.
    part = path.with_name(f".{path.name}.phi3-lora-part")
    with explained(path):
        try:
            yield part
            os.replace(part, path)
            fsync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def replace_file(path: Path, data: bytes) -> None:
    """Write bytes to a file in one move.

    Raises:
        StorageError: when the file cannot be written; the old content stays.
    """
    with replacing(path) as part:
        write_bytes(part, data)


def check_folder_unused(folder: Path, error: type[Phi3LoraError], problem: str) -> None:
    """Check that a folder is new or empty.

    Args:
        folder: the folder.
        error: the type of the error.
        problem: the error message, without the folder's name at its start.

    Raises:
        error: when the folder is not empty, or is a file.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise error(f"{folder} {problem}")


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder and rename it to its final name; an old folder is replaced.

    Args:
        folder: the final name.
        fill: a function that writes the content into the folder that it receives.

    Raises:
        StorageError: when a file cannot be written; the old folder stays.
    """
    folder = folder.resolve()
    # No user's folder has one of these names.
    part = folder.with_name(f".{folder.name}.phi3-lora-part")
    old = folder.with_name(f".{folder.name}.phi3-lora-old")
    with explained(folder):
        _refuse_if_being_written(part, folder)
        if old.exists() and not folder.exists():
            # A crash came between the two renames: the old folder is the last complete one.
            os.rename(old, folder)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        lock = None
        try:
            part.mkdir(parents=True)
            lock = os.open(part, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            fill(part)
            fsync_folder(part)
            if folder.exists():
                # rename() to a folder that is not empty fails, so the old folder is moved first.
                os.rename(folder, old)
            os.rename(part, folder)
            fsync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            if old.exists() and not folder.exists():
                os.rename(old, folder)
            raise
        finally:
            if lock is not None:
                os.close(lock)
        shutil.rmtree(old, ignore_errors=True)


def _refuse_if_being_written(part: Path, folder: Path) -> None:
    """Refuse a folder that another process fills; only a running process holds the lock."""
    if not part.is_dir():
        return
    descriptor = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(
            f"another process is writing {folder}: wait for it, or choose another folder"
        ) from None
    finally:
        os.close(descriptor)
