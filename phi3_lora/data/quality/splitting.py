"""Rows into training and validation data, so that nothing is on both sides.

Rows that repeat each other, exactly or nearly, and rows of one group stay together.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from phi3_lora.data.quality.duplicates import Groups, NearIndex, exact_key, matches_of, spoken_text
from phi3_lora.data.rows.conversation import RawRow, RowError
from phi3_lora.data.rows.formats import FORMATS, RowReader
from phi3_lora.data.sources.source import Source, parts_of
from phi3_lora.engine.random_streams import permutation
from phi3_lora.errors import DataError, listing
from phi3_lora.storage.atomic import check_folder_unused, replace_folder

TRAIN_NAME, VALID_NAME = "train.jsonl", "valid.jsonl"
_KEYS_OF = 1000
"""Rows of which an error names the keys."""


class SplitRow(NamedTuple):
    """What a split keeps of a row: not the row itself, since all rows are in memory."""

    source: str
    """file:line."""
    key: bytes
    """Equal for rows that are exact duplicates."""
    text: str
    """What near duplicates are judged by; empty when they are not looked for."""
    value: Mapping[str, Any]
    """What the row holds under the keys that are asked for, null left out."""
    line: bytes
    """As it is written, without a line end; JSON."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which rows are for validation."""

    valid: list[int]
    """Places of the rows, ascending."""
    num_rows: int
    num_groups: int
    """Sets of rows that stay together."""
    largest_group: int
    """Rows of the largest of them."""
    labels: dict[str, tuple[int, int]]
    """Label -> rows to train and to validate on; empty when not stratified."""


def read_split_rows(
    sources: Sequence[Source],
    *,
    keys: Sequence[str] = (),
    near: bool = True,
    on_bad_row: str = "error",
    notes: list[str] | None = None,
) -> list[SplitRow]:
    """Every row of sources.

    Args:
        sources: in order; weights do not count, each row is there once.
        keys: what rows are grouped or stratified by.
        near: whether near duplicates will be looked for.
        on_bad_row: error, or skip: leave bad rows out and note them.
        notes: gets what was left out.

    Raises:
        DataError: when there is no such source, there are no rows, or rows are bad; all are
            counted; when rows of different formats or columns would go into one file.
    """
    rows: list[SplitRow] = []
    problems: list[str] = []
    kinds: dict[str, str] = {}
    for source in sources:
        for part in parts_of(source):
            reader, lines = RowReader(source.format, source.columns), _LineReader(part.name)
            for raw in part.rows():
                place = f"{part.name}:{raw.line}"
                try:
                    rows.append(_read(raw, place, reader, lines, keys, near=near))
                except RowError as cause:
                    problems.append(f"{place}: {cause}")
            if reader.name != "auto":
                kinds.setdefault(_kind(reader.name, source), part.name)
    names = ", ".join(map(str, sources))
    if problems and on_bad_row == "error":
        title = (
            f"{len(problems):,} bad row(s); correct or remove them (phi3-lora data check lists "
            "them), or leave them out with --set data.on_bad_row=skip:"
        )
        raise DataError(listing(title, problems))
    if problems and notes is not None:
        total = len(problems) + len(rows)
        title = f"left out {len(problems):,} bad row(s) of {total:,} in {names}:"
        notes.append(listing(title, problems))
    if not rows:
        raise DataError(f"{names}: no rows to split")
    if len(kinds) > 1:
        told = [f"{name}: {kind}" for kind, name in kinds.items()]
        title = (
            "one file cannot hold all of these rows; split each source alone, or write them as "
            "messages first (phi3-lora data clean DATA --unicode --output DIR):"
        )
        raise DataError(listing(title, told))
    return rows


def _kind(name: str, source: Source) -> str:
    """What rows must have in common to be read from one file."""
    kind = "messages" if FORMATS[name].is_chat else name
    columns = ", ".join(f"{ours}: {theirs}" for ours, theirs in sorted(source.columns.items()))
    return kind + (f", columns {{{columns}}}" if columns else "")


def _read(
    raw: RawRow,
    place: str,
    reader: RowReader,
    lines: _LineReader,
    keys: Sequence[str],
    *,
    near: bool,
) -> SplitRow:
    if raw.problem is not None:
        raise RowError(raw.problem)
    row = reader.read(raw.value, place)
    value = {key: raw.value[key] for key in keys if raw.value.get(key) is not None}
    text = spoken_text(row) if near else ""
    return SplitRow(place, exact_key(row), text, value, lines.line(raw.line, raw.value))


class _LineReader:
    """The bytes of a JSONL file's lines, asked for in ascending order."""

    def __init__(self, name: str) -> None:
        path = Path(name)
        self._lines: Iterator[tuple[int, bytes]] = iter(())
        if path.is_file():
            self._lines = enumerate(_lines_of(path), start=1)

    def line(self, number: int, value: Any) -> bytes:
        """A line's own bytes; where a file has no such line, the value as JSON."""
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
    """A row as a line of a JSONL file, without a line end."""
    # Parquet has dates and bytes, JSON has not.
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        # Half a surrogate pair under a key that is not read: no UTF-8, but an escape.
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

    Whole groups are drawn in an order that depends on the seed alone, as long as they fit: into
    the share of each label, if stratified. If none fits, the smallest one is taken.

    Args:
        rows: as read_split_rows gives them, with the keys named here.
        fraction: share of the rows to validate on, in (0, 1).
        seed: of the draw.
        group_by: rows with one value under this key stay together.
        stratify_by: each value under this key has the same share.
        near: whether rows that nearly repeat each other stay together.

    Raises:
        DataError: when rows lack a key, there is one row alone, or all rows belong together.
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
        # Among many rows of one template a pair can be missed until it is looked for itself.
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
    """The rows of each group."""
    members: dict[int, list[int]] = defaultdict(list)
    for i in range(size):
        members[groups.find(i)].append(i)
    return list(members.values())


def _together(size: int, group_by: str | None, *, near: bool) -> str:
    if size == 1:
        return "there is one row alone: a split needs two or more"
    way = f"group by another key than {group_by!r}" if group_by else "they repeat each other"
    more = ", or pass --no-near-duplicates" if near else ""
    return f"all {size:,} row(s) belong together, so none can be set aside: {way}{more}"


def _draw(
    units: Sequence[list[int]], labels: Sequence[str], fraction: float, seed: int
) -> list[int]:
    """Rows of whole units that fit into the share of each label, ascending."""
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
    """Pairs of rows on both sides that a check of the two files would find."""
    chosen = set(valid)
    order = [i for i in range(size) if i not in chosen] + list(valid)
    found = index.reordered(order).leaks(size - len(valid))
    return [(order[match.row], order[match.other]) for match in found]


def _values(rows: Sequence[SplitRow], key: str) -> list[str]:
    """What each row holds under a key, as text."""
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
    """Rows of each label to validate on: the largest remainders are rounded up; never all rows.

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
    """Write train.jsonl and valid.jsonl, each in the order of the rows and with their own bytes.

    Raises:
        DataError: when the folder is in use.
        StorageError: when it cannot be written.
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
    """Make sure that a folder is new or empty.

    Raises:
        DataError: when it is not.
    """
    check_folder_unused(folder, DataError, "is in use: choose a new or empty folder (--output)")
