"""Splitting of rows into training and validation data without overlap.

Rows that repeat each other, exactly or nearly, stay on one side, and so do rows of one group.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from phi3_lora.data.options import OnBadRow
from phi3_lora.data.quality.duplicates import (
    Groups,
    NearIndex,
    conversation_text,
    exact_key,
    matches_of,
)
from phi3_lora.data.rows.conversation import BadRow
from phi3_lora.data.rows.formats import FORMATS
from phi3_lora.data.sources.bad_rows import REWRITING, BadRows
from phi3_lora.data.sources.reading import read_parts
from phi3_lora.data.sources.source import Source
from phi3_lora.engine.random_streams import permutation
from phi3_lora.errors import DataError, listing
from phi3_lora.storage.atomic import check_folder_unused, replace_folder

TRAIN_NAME, VALID_NAME = "train.jsonl", "valid.jsonl"
_KEYS_OF = 1000
"""Number of first rows whose keys an error lists."""


class SplitRow(NamedTuple):
    """The facts of a row that a split needs; the row itself would take too much memory."""

    source: str
    """file:line."""
    key: bytes
    """Hash that is equal for exact duplicates."""
    text: str
    """Text by which near duplicates are compared; empty if they are not looked for."""
    value: Mapping[str, Any]
    """Values of the requested keys, without null."""
    line: bytes
    """The line to write: JSON without a line end."""


@dataclass(frozen=True, slots=True)
class Split:
    """The choice of the validation rows."""

    valid: list[int]
    """Indices of the validation rows, ascending."""
    num_rows: int
    num_groups: int
    """Number of sets of rows that stay together."""
    largest_group: int
    """Number of rows in the largest set."""
    labels: dict[str, tuple[int, int]]
    """Label -> number of training rows and of validation rows; empty if not stratified."""


def read_split_rows(
    sources: Sequence[Source],
    *,
    keys: Sequence[str] = (),
    near: bool = True,
    on_bad_row: OnBadRow = "error",
    notes: list[str] | None = None,
) -> list[SplitRow]:
    """Read every row of sources.

    Args:
        sources: the sources; weights are ignored, each row is read once.
        keys: keys by which rows will be grouped or stratified.
        near: True if near duplicates will be looked for.
        on_bad_row: error, or skip, which leaves bad rows out and notes them.
        notes: receives notes on rows that were left out.

    Raises:
        DataError: when a source does not exist, there are no rows, rows are bad, or rows of
            different formats or columns would go into one file.
    """
    rows: list[SplitRow] = []
    bad = BadRows(on_bad_row, REWRITING)
    kinds: dict[str, str] = {}
    for part in read_parts(sources):
        lines = _LineReader(part.name)
        for place, raw, found in part.rows():
            if isinstance(found, BadRow):
                bad.add(found)
                continue
            value = {key: raw.value[key] for key in keys if raw.value.get(key) is not None}
            text = conversation_text(found) if near else ""
            line = lines.line(raw.line, raw.value)
            rows.append(SplitRow(place, exact_key(found), text, value, line))
        if part.format != "auto":
            kinds.setdefault(_kind(part.format, part.source), part.name)
    names = ", ".join(map(str, sources))
    bad.refuse(f"in {names}")
    if notes is not None:
        notes += bad.notes(len(rows), names)
    if not rows:
        raise DataError(f"{names}: no rows to split")
    if len(kinds) > 1:
        found_kinds = [f"{name}: {kind}" for kind, name in kinds.items()]
        title = (
            "one file cannot hold all of these rows; split each source alone, or write them as "
            "messages first (phi3-lora data clean DATA --unicode --output DIR):"
        )
        raise DataError(listing(title, found_kinds))
    return rows


def _kind(name: str, source: Source) -> str:
    """Return the properties that all rows of one file must share: format and columns."""
    kind = "messages" if FORMATS[name].is_chat else name
    columns = ", ".join(f"{ours}: {theirs}" for ours, theirs in sorted(source.columns.items()))
    return kind + (f", columns {{{columns}}}" if columns else "")


class _LineReader:
    """Reader of single lines of a JSONL file; line numbers must ascend."""

    def __init__(self, name: str) -> None:
        path = Path(name)
        self._lines: Iterator[tuple[int, bytes]] = iter(())
        if path.is_file():
            self._lines = enumerate(_lines_of(path), start=1)

    def line(self, number: int, value: Any) -> bytes:
        """Return the bytes of a line, or the value as JSON if the line does not hold the value."""
        for at, line in self._lines:
            if at == number:
                own = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
                return own if _holds(own, value) else as_json(value)
        return as_json(value)


def _lines_of(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from file


def _holds(line: bytes, value: Any) -> bool:
    try:
        return bool(json.loads(line) == value)
    except (ValueError, RecursionError):
        return False


def as_json(value: Any) -> bytes:
    """Return a row as a line of a JSONL file, without a line end."""
    # JSON has no dates and bytes, Parquet has: they are written as strings.
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        # Half a surrogate pair under a key that is not read: UTF-8 has no form for it, JSON has.
        return json.dumps(value, default=str).encode()


def split_rows(
    rows: Sequence[SplitRow],
    *,
    fraction: float,
    seed: int,
    group_by: str | None = None,
    stratify_by: str | None = None,
    near: bool = True,
) -> Split:
    """Choose the rows to validate on.

    Whole groups are drawn in an order that depends on the seed alone. A group is taken if it fits
    into the remaining share of each of its labels. If no group fits, the smallest one is taken.

    Args:
        rows: rows from read_split_rows, read with group_by and stratify_by as keys.
        fraction: share of the rows to validate on, in (0, 1).
        seed: seed of the draw.
        group_by: key; rows with an equal value stay together.
        stratify_by: key; each value gets the same share of validation rows.
        near: True to keep near duplicates together.

    Raises:
        DataError: when rows lack a key, there is only one row, or all rows belong together.
        ConfigError: when near is set and datasketch is not installed.
    """
    index = NearIndex([row.text for row in rows]) if near else None
    groups = Groups(len(rows))
    matches = matches_of([row.key for row in rows])
    matches += index.duplicates(0, len(rows)) if index else []
    for match in matches:
        groups.join(match.row, match.other)
    first: dict[str, int] = {}
    for i, value in enumerate(_values(rows, group_by) if group_by else ()):
        groups.join(i, first.setdefault(value, i))
    labels = _values(rows, stratify_by) if stratify_by else [""] * len(rows)
    while True:
        units = _units(groups, len(rows))
        if len(units) < 2:
            raise DataError(_together(len(rows), group_by, near=near))
        valid = _draw(units, labels, fraction, seed)
        leaks = _leaks(index, valid, len(rows)) if index else []
        if not leaks:
            break
        # The first search can miss pairs among many rows of one template.
        for one, other in leaks:
            groups.join(one, other)
    chosen, totals = Counter(labels[i] for i in valid), Counter(labels)
    shares = {v: (totals[v] - chosen[v], chosen[v]) for v in sorted(totals)}
    return Split(
        valid=valid,
        num_rows=len(rows),
        num_groups=len(units),
        largest_group=max(map(len, units)),
        labels=shares if stratify_by else {},
    )


def _units(groups: Groups, size: int) -> list[list[int]]:
    """List the rows of each group."""
    members: dict[int, list[int]] = defaultdict(list)
    for i in range(size):
        members[groups.find(i)].append(i)
    return list(members.values())


def _together(size: int, group_by: str | None, *, near: bool) -> str:
    if size == 1:
        return "there is only one row: a split needs two or more"
    way = f"group by another key than {group_by!r}" if group_by else "they repeat each other"
    more = ", or pass --no-near-duplicates" if near else ""
    return f"all {size:,} row(s) belong together, so none can be set aside: {way}{more}"


def _draw(
    units: Sequence[list[int]], labels: Sequence[str], fraction: float, seed: int
) -> list[int]:
    """Draw whole units that fit into the share of each label; return their rows, ascending."""
    room = _shares(Counter(labels), fraction)
    order = permutation(seed, "split", size=len(units)).tolist()
    valid: list[int] = []
    for place in order:
        needed = Counter(labels[i] for i in units[place])
        if all(room[label] >= count for label, count in needed.items()):
            room.subtract(needed)
            valid += units[place]
    return sorted(valid or units[min(order, key=lambda place: len(units[place]))])


def _leaks(index: NearIndex, valid: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Find pairs of near duplicates across the split, as a check of the two files would."""
    chosen = set(valid)
    order = [i for i in range(size) if i not in chosen] + list(valid)
    found = index.reordered(order).leaks(size - len(valid))
    return [(order[match.row], order[match.other]) for match in found]


def _values(rows: Sequence[SplitRow], key: str) -> list[str]:
    """Return the value of each row under a key, as text."""
    missing = [row.source for row in rows if key not in row.value]
    if missing:
        there = {str(k) for row in rows[:_KEYS_OF] for k in json.loads(row.line)}
        title = (
            f"{key!r} is missing or null in {len(missing):,} of {len(rows):,} row(s): fill it in, "
            f"leave these rows out, or name another key; keys: {', '.join(sorted(there))}"
        )
        raise DataError(listing(title, missing))
    found = (row.value[key] for row in rows)
    return [v if isinstance(v, str) else json.dumps(v, sort_keys=True, default=str) for v in found]


def _shares(totals: Counter[str], fraction: float) -> Counter[str]:
    """Return the number of validation rows of each label; never all rows.

    The labels with the largest remainders are rounded up.

    Source: Hamilton's method of apportionment.
    """
    exact = {label: count * fraction for label, count in totals.items()}
    shares = Counter({label: int(value) for label, value in exact.items()})
    size = sum(totals.values())
    left = min(max(1, round(size * fraction)), size - 1) - sum(shares.values())
    for label in sorted(exact, key=lambda name: (shares[name] - exact[name], name))[:left]:
        shares[label] += 1
    return shares


def write_split(rows: Sequence[SplitRow], split: Split, folder: Path) -> None:
    """Write train.jsonl and valid.jsonl, with the lines of the rows in their order.

    Raises:
        DataError: when the folder is in use.
        StorageError: when the folder cannot be written.
    """
    check_unused(folder)
    chosen = set(split.valid)

    def fill(part: Path) -> None:
        for name, is_valid in ((TRAIN_NAME, False), (VALID_NAME, True)):
            lines = (row.line + b"\n" for i, row in enumerate(rows) if (i in chosen) is is_valid)
            write_lines(part / name, lines)

    replace_folder(folder, fill)


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file line by line, and flush it to the disk."""
    with open(path, "wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def check_unused(folder: Path) -> None:
    """Check that a folder is new or empty.

    Raises:
        DataError: when the folder is in use.
    """
    check_folder_unused(folder, DataError, "is in use: choose a new or empty folder (--output)")
