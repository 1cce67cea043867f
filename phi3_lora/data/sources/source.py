"""Sources of rows: lookup of files, folders, patterns and data sets by name."""

from __future__ import annotations

import dataclasses
import glob
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from phi3_lora.data.rows.conversation import RawRow
from phi3_lora.data.rows.formats import COLUMNS, FORMATS
from phi3_lora.data.sources.datasets_library import (
    hub_files,
    hub_rows,
    hub_splits,
    is_saved_data_set,
    saved_files,
    saved_rows,
    saved_splits,
)
from phi3_lora.data.sources.files import EXTENSIONS, kind_of, read_raw_rows
from phi3_lora.demo import DEMO_DATA_DIR
from phi3_lora.errors import ConfigError, DataError

_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?:/(?P<subset>[\w.-]+))?")
_WITH_SPLIT = re.compile(r"(?P<path>.+?):(?P<split>[\w.-]+(?:\[.*\])?)")
"""A path and its split, which may be a part of one, such as test[:10%]."""
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Split -> its names in files, folders and data sets."""
_SPLIT_OF = {name: split for split, names in _SPLIT_NAMES.items() for name in names}
ROWS_IN_MEMORY = "(rows in memory)"
"""The path that config.yaml stores for rows in memory."""
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json", "package.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One source of a run's rows (an entry of `data.sources`)."""

    path: str
    """A file, a folder, a pattern, a data set of the hub (owner/name[/subset][:split]), or demo."""
    weight: float = 1.0
    """How often an epoch takes each row: 0.5 takes half of them, 2 takes each twice."""
    split: str | None = None
    """Split of a folder or data set: train, valid, test, or a name that it uses; null is train."""
    subset: str | None = None
    """Configuration of the data set, if there are several."""
    format: str = "auto"
    """Format of the rows; auto takes it from the first row of each file."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column -> the file's name."""
    streaming: bool = False
    """True to read a data set of the hub during the download, without a copy on the disk."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("a source needs a path: a file, a folder, a pattern or a data set")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"{self.path}: weight must be > 0 and finite, got {self.weight}")
        check_format(self.format)
        check_columns(self.columns)

    def __str__(self) -> str:
        """Return the name of the source in messages."""
        return f"{self.path}[{self.split}]" if self.split else self.path

    def rows_in_memory(self) -> Callable[[], Iterator[RawRow]] | None:
        """Return a reader of rows in memory; None if the rows are in files or on the hub."""
        return None


def check_format(name: str) -> None:
    """Check the name of a format of rows.

    Raises:
        ConfigError: when the format is unknown.
    """
    if name not in ("auto", *FORMATS):
        raise ConfigError(f"data format must be one of auto, {', '.join(FORMATS)}; got {name!r}")


def check_columns(columns: dict[str, str]) -> None:
    """Check the keys of a mapping of columns.

    Raises:
        ConfigError: when a key is not one of COLUMNS.
    """
    unknown = sorted(columns.keys() - set(COLUMNS))
    if unknown:
        raise ConfigError(
            f"data.columns maps our names to the file's names; {', '.join(unknown)} is not ours "
            f"({', '.join(COLUMNS)})"
        )


class Part(NamedTuple):
    """One file, or one split of a data set."""

    name: str
    rows: Callable[[], Iterator[RawRow]]
    files: Callable[[], Sequence[Path] | None]
    """Return the files of the rows and of their descriptions; None if they are not on the disk."""


def parts_of(source: Source) -> list[Part]:
    """Return the parts of a source: its files, or one split of its data set.

    Raises:
        DataError: when the source does not exist or has no files.
    """
    read = source.rows_in_memory()
    if read is not None:
        return [Part(source.path, read, lambda: None)]
    place = _place(source)
    if place.hub is not None:
        return [_hub_part(place.hub, place.subset, place.split or "train", source.streaming)]
    if source.subset is not None:
        raise DataError(
            f"{source.path} has no subset {source.subset!r}: only data sets of the hub have subsets"
        )
    if place.root is not None and is_saved_data_set(place.root):
        return [_saved_part(place.root, _saved_split(place))]
    return [_file_part(path) for path in _files(place)]


def _hub_part(name: str, subset: str | None, split: str, streaming: bool) -> Part:
    return Part(
        f"{name}{f'/{subset}' if subset else ''}[{split}]",
        lambda: hub_rows(name, subset, split, streaming=streaming),
        lambda: None if streaming else hub_files(name, subset, split),
    )


def _saved_part(root: Path, split: str | None) -> Part:
    return Part(
        f"{root}[{split}]" if split else str(root),
        lambda: saved_rows(root, split),
        lambda: saved_files(root, split),
    )


def _file_part(path: Path) -> Part:
    return Part(
        str(path),
        lambda: read_raw_rows(path),
        # A pipe can be read only once.
        lambda: [path] if path.is_file() else None,
    )


def check_exists(source: Source) -> None:
    """Check that a source exists; a data set of the hub is looked up only when it is read.

    Raises:
        DataError: when the source does not exist.
    """
    parts_of(source)


def splits_of(source: Source) -> list[str]:
    """Return the split names of a source as it writes them; empty for files and patterns.

    Raises:
        DataError: when the source does not exist.
    """
    place = _place(source)
    if place.hub is not None:
        return hub_splits(place.hub, place.subset)
    if place.root is None:
        return []
    if is_saved_data_set(place.root):
        return saved_splits(place.root)
    return [split for split, files in _folder_splits(place.root).items() if files]


def with_split(source: Source, split: str) -> Source | None:
    """Return the source with a split; None if it has no such split or already names one."""
    if _place(source).split is not None:
        return None
    names = splits_of(source)
    found = next((name for name in names if _SPLIT_OF.get(name.lower()) == split), None)
    return None if found is None else dataclasses.replace(source, split=found)


class _Place(NamedTuple):
    """The place of a source: files, a folder, or a data set of the hub."""

    path: str
    split: str | None
    files: Sequence[Path] = ()
    root: Path | None = None
    hub: str | None = None
    subset: str | None = None


def _place(source: Source) -> _Place:
    if source.rows_in_memory() is not None:
        return _Place(source.path, None)
    if source.path == ROWS_IN_MEMORY:
        raise DataError("the rows of this run were in memory: pass them again, as train(data=rows)")
    if source.path == "demo":
        return _Place(source.path, source.split, root=DEMO_DATA_DIR)
    local = _local(source.path, source.split)
    if local is not None:
        return local
    named = _WITH_SPLIT.fullmatch(source.path) if source.split is None else None
    path, split = (named["path"], named["split"]) if named else (source.path, source.split)
    local = _local(path, split)
    if local is not None:
        return local
    found = _HUB_ID.fullmatch(path)
    if found is None or path.startswith((".", "~")) or kind_of(Path(path)) in (*EXTENSIONS, ".txt"):
        raise DataError(
            f"no such data file: {source.path} (a file, a folder, a pattern such as "
            "'data/*.jsonl', a data set of the hub as owner/name, or demo)"
        )
    subset = source.subset or found["subset"]
    return _Place(source.path, split, hub=found["name"], subset=subset)


def _local(text: str, split: str | None) -> _Place | None:
    path = Path(text).expanduser()
    if path.is_dir():
        return _Place(text, split, root=path)
    # A pipe or a device can be read like a file.
    if path.exists():
        return _Place(text, split, files=[path])
    if not glob.has_magic(text):
        return None
    found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    return _Place(text, split, files=found) if found else None


def _files(place: _Place) -> Sequence[Path]:
    if place.root is None:
        if place.split is not None:
            raise DataError(
                f"{place.path} has no split {place.split!r}: only folders and data sets have splits"
            )
        return place.files
    splits = _folder_splits(place.root)
    wanted = _SPLIT_OF.get((place.split or "train").lower(), place.split or "train")
    found = splits.get(wanted)
    if found:
        return found
    there = ", ".join(split for split, files in splits.items() if files)
    raise DataError(
        f"the folder {place.root} has no {wanted} rows: "
        + (f"it has {there}" if there else f"it holds no file of {', '.join(EXTENSIONS)}")
    )


def _folder_splits(root: Path) -> dict[str, list[Path]]:
    """Sort the data files of a folder and its subfolders by split.

    Files whose path names no split are training files, unless another file names train.

    Source: huggingface.co/docs/hub/datasets-file-names-and-splits.
    """
    splits: dict[str, list[Path]] = {split: [] for split in _SPLIT_NAMES}
    others: list[Path] = []
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        is_hidden = any(part.startswith(".") for part in inner.parts)
        if is_hidden or kind_of(path) not in EXTENSIONS or path.name in _NOT_ROWS:
            continue
        if not path.is_file():
            continue
        words = [w for part in reversed(inner.parts) for w in re.split(r"[-_. \d]+", part.lower())]
        split = next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), None)
        (others if split is None else splits[split]).append(path)
    splits["train"] = splits["train"] or others
    return splits


def _saved_split(place: _Place) -> str | None:
    assert place.root is not None
    names = saved_splits(place.root)
    if not names:
        if place.split is not None:
            raise DataError(f"{place.path} has no split {place.split!r}: it is a single split")
        return None
    wanted = place.split or "train"
    own = _SPLIT_OF.get(wanted)
    found = [n for n in names if n == wanted or (own and _SPLIT_OF.get(n) == own)]
    if not found:
        raise DataError(f"{place.path} has no split {wanted!r}; it has {', '.join(names)}")
    return found[0]
