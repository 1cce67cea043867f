"""Sources for rows in memory: a list of rows, or a data set of the library `datasets`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3_lora.data.rows.conversation import RawRow
from phi3_lora.data.sources.datasets_library import LibraryDataSet, data_set_rows, is_data_set
from phi3_lora.data.sources.source import ROWS_IN_MEMORY, Source
from phi3_lora.errors import ConfigError, DataError

RowsInMemory = Sequence[Mapping[str, Any]] | LibraryDataSet
"""A list of rows, or a `datasets.Dataset`."""
Data = str | Path | Source | RowsInMemory
"""A path, a hub id or `demo` (str or Path), a Source, or rows in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySource(Source):
    """Rows in memory; a configuration cannot hold them."""

    path: str = "rows"
    """Name of the rows in messages; the third row is `rows:3`."""
    rows: RowsInMemory = field(compare=False, repr=False)

    def __post_init__(self) -> None:
        # A dataclass with slots is a new class, which super() without arguments does not find.
        Source.__post_init__(self)
        if self.split is not None or self.subset is not None:
            raise ConfigError("rows in memory have no split and no subset: leave both out")
        if not _is_rows(self.rows):
            raise DataError(
                "data must be a path, a data set of the hub, demo, a list of rows or a "
                f"datasets.Dataset; got {_described(self.rows)}"
            )
        if isinstance(self.rows, Sized) and not len(self.rows):
            raise DataError(f"{self.path}: there are no rows: the list is empty")

    def rows_in_memory(self) -> Callable[[], Iterator[RawRow]]:
        """Return a reader of the rows, which numbers them from 1."""
        return self._read

    def _read(self) -> Iterator[RawRow]:
        if is_data_set(self.rows):
            return data_set_rows(self.path, self.rows)
        return (RawRow(i, _as_json(row)) for i, row in enumerate(self.rows, start=1))


def as_source(data: Data, name: str = "rows", like: Source | None = None) -> Source:
    """Return data as a source.

    Args:
        data: a path, a hub id, `demo`, a Source, a list of rows or a `datasets.Dataset`.
        name: the name of rows in memory in messages.
        like: a source; the new source takes its format, columns and streaming.

    Raises:
        DataError: when data has another type, or is an empty list.
        ConfigError: when the path is empty.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (str, Path)):
        source = Source(path=str(data))
    else:
        source = MemorySource(path=name, rows=data)
    if like is None:
        return source
    return dataclasses.replace(
        source, format=like.format, columns=like.columns, streaming=like.streaming
    )


def with_rows(named: Source, rows: Data) -> MemorySource:
    """Return a source for rows in memory with the settings of another source.

    Args:
        named: the source in a configuration; its path is ignored.
        rows: a list of rows, or a `datasets.Dataset`.

    Raises:
        ConfigError: when the source names a split or a subset.
        DataError: when rows has another type, or is an empty list.
    """
    settings = {f.name: getattr(named, f.name) for f in dataclasses.fields(Source)}
    return MemorySource(**{**settings, "path": "rows", "rows": rows})


def is_named(data: Data) -> bool:
    """Return whether data is a name or a path, not rows in memory."""
    return isinstance(data, (str, Path, Source)) and not isinstance(data, MemorySource)


def recorded_name(data: Data) -> str:
    """Return the path that config.yaml stores for data; it is ROWS_IN_MEMORY for rows in memory."""
    if not is_named(data):
        return ROWS_IN_MEMORY
    return data.path if isinstance(data, Source) else str(data)


def _is_rows(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return is_list or is_data_set(value)


def _described(value: Any) -> str:
    name = type(value).__name__
    if isinstance(value, Mapping):
        return f"{name}: name one of its splits, for example data['train']"
    is_iterator = isinstance(value, Iterator)
    return f"{name}: make a list of it, since rows are read more than once" if is_iterator else name


def _as_json(value: Any) -> Any:
    """Copy a row with lists in place of tuples, as a JSON file would hold it."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value
