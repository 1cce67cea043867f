from __future__ import annotations

import functools
import gzip
import io
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from phi3_lora.data.rows.conversation import RawRow
from phi3_lora.data.sources import files
from phi3_lora.data.sources.files import read_raw_rows
from phi3_lora.errors import DataError
from tests.tiny import chat

# Without mtime=0 the content, and with it the name of a test, differs between workers.
gzipped = functools.partial(gzip.compress, mtime=0)
ROWS = [{"prompt": f"q{i}", "completion": f"ä{i}"} for i in range(3)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def rows_of(path: Path, content: bytes) -> list[RawRow]:
    path.write_bytes(content)
    return list(read_raw_rows(path))


def parquet(rows: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("d.jsonl", JSONL, [1, 2, 3]),
        ("d.data", JSONL, [1, 2, 3]),
        ("d.json", JSONL, [1, 2, 3]),
        ("d.jsonl.gz", gzipped(JSONL), [1, 2, 3]),
        ("d.jsonl", gzipped(JSONL), [1, 2, 3]),
        ("d.jsonl.gz", JSONL, [1, 2, 3]),
        ("d.jsonl", gzipped(JSONL[:20]) + gzipped(JSONL[20:]), [1, 2, 3]),
        ("d.jsonl.zst", zstd(JSONL), [1, 2, 3]),
        ("d.jsonl", zstd(JSONL[:20]) + zstd(JSONL[20:]), [1, 2, 3]),
        ("d.json", json.dumps(ROWS).encode(), [1, 1, 1]),
        ("d.json", json.dumps(ROWS, indent=1).encode(), [2, 6, 10]),
        ("d.jsonl", json.dumps(ROWS).encode(), [1, 1, 1]),
        ("d.jsonl", json.dumps(ROWS, indent=1).encode(), [2, 6, 10]),
        ("d.json.gz", gzipped(json.dumps(ROWS).encode()), [1, 1, 1]),
        ("d.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode(), [4, 8, 12]),
        ("d.json", json.dumps({"data": ROWS, "version": "1"}).encode(), [1, 1, 1]),
        ("d.json", b"\xef\xbb\xbf\n" + json.dumps(ROWS).encode() + b"\n", [2, 2, 2]),
        ("d.csv", "prompt,completion\nq0,ä0\nq1,ä1\nq2,ä2\n".encode(), [2, 3, 4]),
        ("d.csv", "\ufeffprompt;completion\r\nq0;ä0\r\nq1;ä1\r\n\r\nq2;ä2".encode(), [2, 3, 5]),
        ("d.tsv", "prompt\tcompletion\nq0\tä0\nq1\tä1\nq2\tä2\n".encode(), [2, 3, 4]),
        ("d.csv.gz", gzipped("completion,prompt\nä0,q0\nä1,q1\nä2,q2\n".encode()), [2, 3, 4]),
        ("d.parquet", parquet(ROWS), [1, 2, 3]),
        ("d.bin", parquet(ROWS), [1, 2, 3]),
    ],
)
def test_rows_of_every_kind_of_file(
    tmp_path: Path, name: str, content: bytes, lines: list[int]
) -> None:
    found = rows_of(tmp_path / name, content)
    assert [row.value for row in found] == ROWS
    assert [row.line for row in found] == lines


def test_text_file_has_a_row_a_line(tmp_path: Path) -> None:
    found = rows_of(tmp_path / "d.txt", b"[one]\n\n{two\r\n")
    assert found == [RawRow(1, {"text": "[one]"}), RawRow(3, {"text": "{two"})]


def test_pretty_json_of_one_row_is_a_row(tmp_path: Path) -> None:
    found = rows_of(tmp_path / "d.json", json.dumps(chat("q", "a"), indent=2).encode())
    assert found == [RawRow(1, chat("q", "a"))]


def test_csv_keeps_quotes_line_ends_and_long_fields(tmp_path: Path) -> None:
    long = "x" * 200_000
    content = f'prompt,completion\n"a ""b""\nc",{long}\n,d\n'.encode()
    found = rows_of(tmp_path / "d.csv", content)
    assert found[0] == RawRow(2, {"prompt": 'a "b"\nc', "completion": long})
    assert found[1] == RawRow(4, {"completion": "d"})


def test_list_of_json_is_read_across_the_parts_it_comes_in(tmp_path: Path) -> None:
    rows = [{"text": "ä" * n, "n": 10**n} for n in range(0, 1800, 1)]
    found = rows_of(tmp_path / "d.json", json.dumps(rows, ensure_ascii=False).encode())
    assert [row.value for row in found] == rows
    assert found[-1].problem is None and len(found) == 1800


@pytest.mark.parametrize(
    ("name", "content", "line", "phrase"),
    [
        ("d.jsonl", b'{"a": 1}\n{"a": \n{"a": 2}\n', 2, "not JSON: "),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xc3"}\n{"a": 2}\n', 2, "not UTF-8 (byte 8 of the line)"),
        ("d.jsonl", b'{"a": 1}\n' + b"[" * 10_000 + b'\n{"a": 2}\n', 2, "not JSON: "),
        ("d.jsonl", b'{"a": 1}\n{"b": 1, "b": 2}\n{"a": 2}\n', 2, "has the key 'b' twice"),
        ("d.jsonl", b'{"a": 1}\n{"c": {"b": 1, "b": 2}}\n{"a": 2}\n', 2, "has the key 'b' twice"),
        ("d.json", b'[{"a": 1},\n{"b": 1, "b": 2},\n{"a": 2}]', 2, "has the key 'b' twice"),
        ("d.csv", b"a\n1\n2,3\n2\n", 3, "has 2 fields, the header 1"),
        ("d.csv", b"a,b\n1,1\n\xe4,2\n2,2\n", 3, "not UTF-8"),
        ("d.csv", b'a,b\n1,1\n"a"b,2\n2,2\n', 3, "not CSV: "),
        ("d.txt", b"a\n\xe4\nb\n", 2, "not UTF-8"),
    ],
)
def test_row_that_cannot_be_parsed_is_a_problem_among_the_others(
    tmp_path: Path, name: str, content: bytes, line: int, phrase: str
) -> None:
    found = rows_of(tmp_path / name, content)
    assert [row.problem is None for row in found] == [True, False, True]
    assert found[1].line == line and phrase in str(found[1].problem)
    assert found[1].kind == ("encoding" if "UTF-8" in phrase else "bad-row")


def test_cut_last_line_is_a_problem(tmp_path: Path) -> None:
    found = rows_of(tmp_path / "d.jsonl", JSONL[:-10])
    assert [row.problem is None for row in found] == [True, True, False]


def test_quote_that_is_not_closed_is_named_by_its_line(tmp_path: Path) -> None:
    found = rows_of(tmp_path / "d.csv", b'a,b\n1,1\n"x,2\n3,3\n')
    assert found[1].line == 3 and "not CSV" in str(found[1].problem)
    # The text within the quotes may be rows, whose loss must be reported.
    lost = "; lost with it: lines 4 to 4; is a quote not closed?"
    assert len(found) == 2 and str(found[1].problem).endswith(lost)


def test_quote_that_is_not_closed_ends_where_a_row_would_be_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LONGEST_ROW", 1000)
    rows = "".join(f"{i},{i}\n" for i in range(100, 400))
    found = rows_of(tmp_path / "d.csv", f'a,b\n1,1\n"x,2\n{rows}'.encode())
    problem = found[1].problem or ""
    last = int(problem.split("to ")[1].split(";")[0])
    assert "field larger than field limit (1000)" in problem and 120 < last < 140
    # Reading continues on the line after the lost ones, and loses no other line.
    assert found[2] == RawRow(last + 1, {"a": str(last + 97), "b": str(last + 97)})
    assert len(found) == 2 + 303 - last and all(row.problem is None for row in found[2:])


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.txt"])
def test_line_that_is_too_long_is_a_problem_among_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(files, "_LONGEST_LINE", 100)
    long = b"1" * 300
    found = rows_of(tmp_path / name, b"11\n22\n" + long + b"\n44\n" + long)
    rows = [(row.line, row.problem is None) for row in found]
    good = [(1, True)] if name != "d.csv" else []
    assert rows == [*good, (2, True), (3, False), (4, True), (5, False)]
    assert all("longer than" in str(row.problem) for row in found if row.problem)


def test_csv_files_read_in_turn_keep_their_long_fields(tmp_path: Path) -> None:
    long = "x" * 200_000
    for name, count in (("a.csv", 1), ("b.csv", 2)):
        (tmp_path / name).write_text("t\n" + f"{long}\n" * count)
    first, second = (read_raw_rows(tmp_path / name) for name in ("a.csv", "b.csv"))
    found = [next(first), next(second), *first, *second]
    assert [row.value for row in found] == [{"t": long}] * 3


def test_blank_lines_before_the_header_of_csv_are_accepted(tmp_path: Path) -> None:
    found = rows_of(tmp_path / "d.csv", b"\xef\xbb\xbf\r\n \n\na;b\r\n\r\n1;2\r\n")
    assert found == [RawRow(6, {"a": "1", "b": "2"})]


CUT_LIST = json.dumps(ROWS, indent=1).encode()[:-20]


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        ("d.jsonl.gz", gzipped(JSONL * 200)[:-20], "is damaged after line"),
        ("d.jsonl", gzipped(JSONL)[:5], "is damaged after line 0"),
        ("d.gz", gzipped(JSONL)[:-8] + b"\0" * 8, "is damaged after line"),
        ("d.jsonl.zst", zstd(JSONL * 200)[:-5], "is damaged after line"),
        ("d.jsonl.zst", zstd(JSONL)[:4] + b"\xff" * 40, "is damaged after line 0"),
        ("d.parquet", parquet(ROWS)[:-20], "is damaged after row 0"),
        ("d.parquet.gz", gzipped(parquet(ROWS)), "is a compressed Parquet file: unpack it"),
        ("d.zip", b"PK\x03\x04", "is a zip archive: unpack it first"),
        ("d.csv", "text,label\na,b\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("d.jsonl", b"\xfe\xff\x00{\x00}", "is UTF-16: save it as UTF-8"),
        ("d.json", CUT_LIST, "d.json:12: not JSON: Unterminated"),
        ("d.json", b'[{"a": 1}\n{"a": 2}]', "d.json:2: not JSON: , or ] must come here, got {"),
        ("d.json", b'[{"a": 1}, nope, {"a": 2}]' + b" " * 100, "d.json:1: not JSON: "),
        ("d.json", b'[{"a": 1}]\n[', "d.json:2: not JSON: something follows"),
        ("d.json", b"[" * 10_000, "nested too deep"),
        ("d.json", b'[{"a": "\xe4"}]', "not UTF-8 from here on"),
        ("d.json", b'{"a": [{}], "b": [{}]}', "a second list of rows ('b')"),
        ("d.json", b"{1: 2}", "d.json:1: not JSON: a key must be a string"),
        ("d.csv", b'"a"b,c\n1,2\n', "d.csv:1: the header is not CSV: "),
        ("d.csv", b"a,b,a\n1,2,3\n", "d.csv:1: the header names a twice"),
    ],
)
def test_damaged_file_is_one_error(tmp_path: Path, name: str, content: bytes, phrase: str) -> None:
    with pytest.raises(DataError) as problem:
        rows_of(tmp_path / name, content)
    assert phrase in str(problem.value)


@pytest.mark.parametrize(
    ("name", "make", "package"),
    [("d.zst", zstd, "zstandard"), ("d.parquet", lambda _: parquet(ROWS), "pyarrow")],
)
def test_missing_package_is_named_with_what_installs_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    make: Callable[[bytes], bytes],
    package: str,
) -> None:
    content = make(JSONL)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{package}: pip install 'phi3-lora\[data\]'"):
        rows_of(tmp_path / name, content)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.csv"])
def test_file_is_not_held_in_memory(tmp_path: Path, name: str) -> None:
    path, row = tmp_path / name, json.dumps({"text": "x" * 990})
    text = {
        ".jsonl": f"{row}\n" * 20_000,
        ".gz": f"{row}\n" * 20_000,
        ".json": "[" + ",".join([row] * 20_000) + "]",
        ".csv": "text\n" + ("x" * 990 + "\n") * 20_000,
    }[path.suffix]
    path.write_bytes(gzip.compress(text.encode(), 1) if name.endswith("gz") else text.encode())
    del text
    tracemalloc.start()
    count = sum(1 for _ in read_raw_rows(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    # The file has 20 MB; one part of 1 MiB is in memory, as bytes and as text.
    assert peak < 8_000_000


PIECES = st.sampled_from(
    [
        *(bytes([b]) for b in b'[]{}:,"\n 1'),
        b'"a"',
        b'{"a": 1}',
        b"\xc3",
        b"\xef\xbb\xbf",
        b"\x1f\x8b",
    ]
)


@given(st.lists(PIECES | st.binary(max_size=3)), st.sampled_from(["json", "jsonl", "csv", "txt"]))
def test_any_bytes_are_rows_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    try:
        found = rows_of(path, b"".join(pieces))
    except DataError as problem:
        assert str(path) in str(problem)
        return
    assert [row.line for row in found] == sorted(row.line for row in found)
