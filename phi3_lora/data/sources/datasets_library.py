"""Data sets of the hub, and folders that the library `datasets` saved, as raw rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeGuard, TypeVar

from phi3_lora.data.rows.conversation import RawRow
from phi3_lora.errors import DataError
from phi3_lora.storage.optional import optional_package

T = TypeVar("T")


class LibraryDataSet(Protocol):
    """The part of `datasets.Dataset` that is read; `datasets.IterableDataset` has it, too."""

    @property
    def features(self) -> Mapping[str, Any] | None:
        """Column -> its type; None when the library does not know the types."""

    def __iter__(self) -> Iterator[Any]: ...


_DESCRIPTIONS = ("state.json", "dataset_info.json")


def is_saved_data_set(folder: Path) -> bool:
    """Return whether `save_to_disk` of the library `datasets` wrote the folder."""
    names = {"dataset_dict.json"}, set(_DESCRIPTIONS)
    return any(all((folder / name).is_file() for name in some) for some in names)


def saved_splits(folder: Path) -> list[str]:
    """Names of the splits of a saved data set; none if it is one split alone.

    Raises:
        DataError: when its list of splits is damaged.
    """
    path = folder / "dataset_dict.json"
    if not path.is_file():
        return []
    try:
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise DataError(f"{path} is damaged: {cause}") from None


def hub_splits(name: str, subset: str | None) -> list[str]:
    """Names of the splits of a data set of the hub.

    Raises:
        DataError: when the hub has no such data set or is out of reach.
    """
    datasets = _library(name)
    return [str(n) for n in _called(name, lambda: datasets.get_dataset_split_names(name, subset))]


def saved_rows(folder: Path, split: str | None) -> Iterator[RawRow]:
    """Rows of a saved data set.

    Raises:
        DataError: when it is damaged.
    """
    return data_set_rows(str(folder), _saved(folder, split))


def saved_files(folder: Path, split: str | None) -> Sequence[Path] | None:
    """The files that the rows of a saved data set and their meaning lie in.

    Raises:
        DataError: when it is damaged.
    """
    return _files_under(_saved(folder, split))


def hub_rows(name: str, subset: str | None, split: str, *, streaming: bool) -> Iterator[RawRow]:
    """Rows of a data set of the hub.

    Args:
        name: owner/name.
        subset: its configuration, where it has several.
        split: a split, or a part of one in the library's own notation.
        streaming: read the rows as they arrive, without a copy in the library's cache.

    Raises:
        DataError: when the hub has no such data set or is out of reach.
    """
    return data_set_rows(name, _loaded(name, subset, split, streaming=streaming))


def hub_files(name: str, subset: str | None, split: str) -> Sequence[Path] | None:
    """The files that a data set of the hub lies in on the disk, downloaded where it has to be.

    Args:
        name: owner/name.
        subset: its configuration, where it has several.
        split: as hub_rows; of a part of a split these are the files of the whole split.

    Returns:
        None when the library keeps the rows in memory.

    Raises:
        DataError: when the hub has no such data set or is out of reach.
    """
    return _files_under(_loaded(name, subset, split, streaming=False))


def _saved(folder: Path, split: str | None) -> Any:
    datasets = _library(str(folder))
    data = _called(str(folder), lambda: datasets.load_from_disk(str(folder)))
    return data if split is None else data[split]


def _loaded(name: str, subset: str | None, split: str, *, streaming: bool) -> Any:
    datasets = _library(name)
    return _called(
        name, lambda: datasets.load_dataset(name, subset, split=split, streaming=streaming)
    )


def _files_under(data: Any) -> Sequence[Path] | None:
    rows = [Path(file["filename"]) for file in data.cache_files]
    # What rows mean, such as the names of classes, stands beside them.
    folders = sorted({path.parent for path in rows})
    meanings = [folder / name for folder in folders for name in _DESCRIPTIONS]
    return [*rows, *(path for path in meanings if path.is_file())] or None


def is_data_set(value: object) -> TypeGuard[LibraryDataSet]:
    """Return whether a value is one split of a data set of the library, without importing it."""
    return hasattr(value, "features") and hasattr(value, "__iter__") and not isinstance(value, dict)


def data_set_rows(name: str, data: LibraryDataSet) -> Iterator[RawRow]:
    """Read the rows of one split, with the names of classes in place of their numbers.

    Args:
        name: what to call the data set in messages.
        data: one split.

    Raises:
        DataError: when the library cannot read a row.
    """
    labels = {
        key: feature.names
        for key, feature in (data.features or {}).items()
        if isinstance(getattr(feature, "names", None), list)
    }
    rows = iter(data)
    number = 0
    while True:
        row = _called(name, lambda: next(rows, None))
        if row is None:
            return
        number += 1
        yield RawRow(number, _with_names(row, labels) if labels else row)


def _with_names(row: Mapping[str, Any], labels: Mapping[str, list[str]]) -> dict[str, Any]:
    """A row with the names of its classes in place of their numbers."""
    return {
        key: labels[key][value]
        if key in labels and isinstance(value, int) and 0 <= value < len(labels[key])
        else value
        for key, value in row.items()
    }


def _library(name: str) -> Any:
    need = f"the data set {name} needs the package datasets"
    return optional_package("datasets", extra="data", need=need, error=DataError)


def _called(name: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as cause:  # the library raises exceptions of every package below it
        first = next(iter(str(cause).strip().splitlines()), "")
        raise DataError(
            f"the data set {name} cannot be read: {type(cause).__name__}: {first}"
        ) from None
