"""Raw rows of data sets on the hub, and of folders that the library `datasets` saved."""

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
    """Return whether `save_to_disk` of the library `datasets` wrote a folder."""
    names = {"dataset_dict.json"}, set(_DESCRIPTIONS)
    return any(all((folder / name).is_file() for name in some) for some in names)


def saved_splits(folder: Path) -> list[str]:
    """Return the split names of a saved data set; empty if it is a single split.

    Raises:
        DataError: when the list of splits is damaged.
    """
    path = folder / "dataset_dict.json"
    if not path.is_file():
        return []
    try:
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise DataError(f"{path} is damaged: {cause}") from None


def hub_splits(name: str, subset: str | None) -> list[str]:
    """Return the split names of a data set on the hub.

    Raises:
        DataError: when the hub has no such data set or is out of reach.
    """
    datasets = _library(name)
    return [str(n) for n in _called(name, lambda: datasets.get_dataset_split_names(name, subset))]


def saved_rows(folder: Path, split: str | None) -> Iterator[RawRow]:
    """Read the rows of a saved data set.

    Raises:
        DataError: when the data set is damaged.
    """
    return data_set_rows(str(folder), _saved(folder, split))


def saved_files(folder: Path, split: str | None) -> Sequence[Path] | None:
    """Return the files of a saved data set: its rows and its descriptions.

    Raises:
        DataError: when the data set is damaged.
    """
    return _files_under(_saved(folder, split))


def hub_rows(name: str, subset: str | None, split: str, *, streaming: bool) -> Iterator[RawRow]:
    """Read the rows of a data set on the hub.

    Args:
        name: owner/name.
        subset: the configuration, if the data set has several.
        split: a split, or a part of one in the notation of `datasets`, such as train[:10%].
        streaming: read rows during the download, without a copy in the library's cache.

    Raises:
        DataError: when the hub has no such data set or is out of reach.
    """
    return data_set_rows(name, _loaded(name, subset, split, streaming=streaming))


def hub_files(name: str, subset: str | None, split: str) -> Sequence[Path] | None:
    """Return the local files of a data set on the hub; download missing ones.

    Args:
        name: owner/name.
        subset: the configuration, if the data set has several.
        split: a split; for a part of a split the result has the files of the whole split.

    Returns:
        The files; None when the library keeps the rows in memory.

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
    # The descriptions hold the meaning of values, such as the names of classes.
    folders = sorted({path.parent for path in rows})
    meanings = [folder / name for folder in folders for name in _DESCRIPTIONS]
    return [*rows, *(path for path in meanings if path.is_file())] or None


def is_data_set(value: object) -> TypeGuard[LibraryDataSet]:
    """Return whether a value is one split of `datasets`, without importing that package."""
    return hasattr(value, "features") and hasattr(value, "__iter__") and not isinstance(value, dict)


def data_set_rows(name: str, data: LibraryDataSet) -> Iterator[RawRow]:
    """Read the rows of one split; class numbers become class names.

    Args:
        name: the name of the data set in messages.
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
    """Return a row with class names in place of class numbers."""
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
    except Exception as cause:  # the library lets exceptions of all its dependencies through
        first = next(iter(str(cause).strip().splitlines()), "")
        raise DataError(
            f"the data set {name} cannot be read: {type(cause).__name__}: {first}"
        ) from None
