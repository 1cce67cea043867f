"""Reading of data files as raw rows: JSONL, JSON, CSV, text and Parquet, plain or compressed.

Rows are read one at a time; formats.py finds the conversation of a row.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from phi3_lora.data.rows.conversation import ENCODING, RawRow, RowError, named
from phi3_lora.data.rows.formats import COLUMNS, LONGEST_ROW
from phi3_lora.data.sources.json_stream import json_text_rows, parse_json
from phi3_lora.errors import DataError
from phi3_lora.storage.optional import optional_package

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Extensions of data files in a folder; a text file is read only if a source names it."""
COMPRESSED = (".gz", ".zst")
_GZIP, _ZSTD, _PARQUET, _ZIP = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"PK\x03\x04"
_CHUNK = 1 << 20
_LONGEST_LINE = 1 << 26
"""Bytes that a line may have: LONGEST_ROW characters, all written as JSON escapes."""
_TOO_LONG = f"the line is longer than {_LONGEST_LINE >> 20} MiB: is it one row?"
_ROWS_AT_ONCE = 1024


def read_raw_rows(path: Path) -> Iterator[RawRow]:
    """Read every row of a file; its first bytes and then its extension decide the file type.

    A row that cannot be parsed becomes a problem; reading continues after it.

    Raises:
        DataError: when the file or a required package is missing, or the file is damaged.
    """
    last = 0
    try:
        with _opened(path) as raw:
            magic = raw.peek(len(_PARQUET))[:4]
            if magic == _PARQUET:
                yield from _parquet_rows(path)
                return
            if magic == _ZIP:
                raise DataError(f"{path} is a zip archive: unpack it first")
            for row in _text_rows(path, _decompressed(raw, magic)):
                last = row.line
                yield row
    except FileNotFoundError:
        raise DataError(f"no such data file: {path}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as cause:
        raise DataError(
            f"{path} is damaged after line {last:,} ({cause}): fetch or compress it again"
        ) from None
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror or cause}") from None


def _opened(path: Path) -> io.BufferedReader:
    return io.BufferedReader(io.FileIO(path), _CHUNK)


def kind_of(path: Path) -> str:
    """Return a file's extension in lower case, without extensions of compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _decompressed(raw: io.BufferedReader, magic: bytes) -> io.BufferedReader:
    # The content decides: names of compressed files often lack the extension.
    if magic[:2] == _GZIP:
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _CHUNK)
    if magic == _ZSTD:
        return io.BufferedReader(_ZstdReader(raw), _CHUNK)
    return raw


class _ZstdReader(io.RawIOBase):
    """Reader of .zst files that detects a cut file, which the library's own reader does not."""

    def __init__(self, source: IO[bytes]) -> None:
        zstandard = optional_package(
            "zstandard",
            extra="data",
            need=".zst files need the package zstandard",
            error=DataError,
        )
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._source = source
        self._frame = self._new()
        self._is_whole = True
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_whole = self._new(), True
            chunk = chunk or self._source.read(_CHUNK)
            if not chunk and self._is_whole:
                return 0
            if not chunk:
                raise EOFError("the file ends within a zstd frame")
            try:
                self._ready = self._frame.decompress(chunk)
            except self._error as cause:
                raise EOFError(str(cause)) from None
            self._is_whole = self._frame.eof
        taken = min(len(buffer), len(self._ready))
        buffer[:taken], self._ready = self._ready[:taken], self._ready[taken:]
        return taken


def _text_rows(path: Path, stream: io.BufferedReader) -> Iterator[RawRow]:
    kind = kind_of(path)
    if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"{path} is UTF-16: save it as UTF-8 (in a spreadsheet: CSV UTF-8)")
    if stream.peek(4)[:4] == _PARQUET:
        raise DataError(
            f"{path} is a compressed Parquet file: unpack it; Parquet itself compresses"
        )
    if kind in (".csv", ".tsv"):
        return _csv_rows(path, stream, kind)
    if kind == ".txt":
        return _lines(stream)
    return _json_rows(path, stream, kind)


def _lines(stream: IO[bytes]) -> Iterator[RawRow]:
    """Read the lines that are not blank as text rows; accept a byte order mark and CRLF."""
    for number, line in enumerate(_bounded_lines(stream), start=1):
        if line is None:
            yield RawRow(number, None, _TOO_LONG)
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as cause:
            yield RawRow(
                number,
                None,
                f"not UTF-8 (byte {cause.start + 1} of the line): save the file as UTF-8",
                ENCODING,
            )
            continue
        if text.strip():
            yield RawRow(number, {"text": text.rstrip("\r\n")})


def _bounded_lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Read every line; None stands for a line that is too long."""
    while line := stream.readline(_LONGEST_LINE + 1):
        if len(line) <= _LONGEST_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_CHUNK)
        yield None


def _json_rows(path: Path, stream: io.BufferedReader, kind: str) -> Iterator[RawRow]:
    if _is_one_text(stream.peek(), kind):
        yield from json_text_rows(path, stream.read, COLUMNS)
        return
    for row in _lines(stream):
        if row.problem:
            yield row
            continue
        try:
            yield RawRow(row.line, parse_json(row.value["text"]))
        except RowError as cause:
            yield RawRow(row.line, None, str(cause))


def _is_one_text(head: bytes, kind: str) -> bool:
    """Return whether a file with these first bytes is one JSON text, not one text per line."""
    first, _, rest = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if first[:1] not in (b"[", b"{") or (first[:1] == b"{" and kind != ".json"):
        return False
    if first[:1] == b"[" and kind not in (".jsonl", ".ndjson"):
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


def _csv_rows(path: Path, stream: IO[bytes], kind: str) -> Iterator[RawRow]:
    lines = _CsvLines(stream)
    try:
        first = next((line for line in lines if line.strip("\ufeff\r\n ")), "")
        first = first.removeprefix("\ufeff")
        delimiter = _delimiter(first, kind)
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        header = _header(path, _next_fields(reader) or [])
    except csv.Error as cause:
        raise DataError(f"{path}:1: the header is not CSV: {cause}") from None
    while True:
        line = lines.number + 1
        try:
            fields = _next_fields(reader)
        except csv.Error as cause:
            lost = f"; lost with it: lines {line + 1:,} to {lines.number:,}; is a quote not closed?"
            is_alone = lines.number == line
            yield RawRow(line, None, f"not CSV: {cause}{'' if is_alone else lost}")
            continue
        if fields is None:
            return
        if fields:
            yield _csv_row(line, header, fields)


class _CsvLines:
    """Lines for csv.reader, which can continue after a line that is too long."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines = _bounded_lines(stream)
        self.number = 0
        """Number of lines read so far."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        if line is None:
            raise csv.Error(_TOO_LONG)
        # Bytes that are not UTF-8 become half surrogates: only their own row is then bad.
        return line.decode("utf-8", "surrogateescape")


def _next_fields(reader: Iterator[list[str]]) -> list[str] | None:
    # The limit is global to the process; several files may be read in turn, row by row.
    before = csv.field_size_limit(LONGEST_ROW)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _header(path: Path, names: list[str]) -> list[str]:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: the header names {named(twice)} twice: rename a column")
    return names


def _csv_row(line: int, header: list[str], fields: list[str]) -> RawRow:
    if len(fields) != len(header):
        return RawRow(line, None, f"has {len(fields)} fields, the header {len(header)}")
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError:
        return RawRow(line, None, "not UTF-8: save the file as UTF-8", ENCODING)
    # An empty cell equals an absent key of other formats.
    return RawRow(line, {k: v for k, v in zip(header, fields, strict=True) if v})


def _delimiter(header: str, kind: str) -> str:
    """Return a tab for .tsv; else the most frequent of comma, semicolon and tab in the header."""
    return "\t" if kind == ".tsv" else max(",;\t", key=header.count)


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    need = "Parquet files need the package pyarrow"
    pyarrow, parquet = (
        optional_package(name, extra="data", need=need, error=DataError)
        for name in ("pyarrow", "pyarrow.parquet")
    )
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(number, value)
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"{path} is damaged after row {number:,}: {cause}") from None
