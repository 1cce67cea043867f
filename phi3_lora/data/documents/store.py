"""Encoded rows on the disk, read through memory maps: unread rows take no memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from phi3_lora.arrays import Bool, Int32
from phi3_lora.data.chat.rendering import Remarks
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.encoding import HAS_MARKER_TEXT, ROW, SYSTEM_DROPPED, EncodedRow
from phi3_lora.data.sources.reading import Rows
from phi3_lora.storage.atomic import write_bytes

STORE_VERSION = 1
_META = "meta.json"
_DTYPES: dict[str, Any] = {
    "tokens": "<i4",
    "supervised": "?",
    "rows": ROW,
    "ends": "<i8",
    "texts": "u1",
    "text_ends": "<i8",
}
"""File -> dtype of its array.

tokens and supervised hold the ids and masks of all rows, end to end; rows holds a ROW per row; ends
holds the index after each row's last id. texts holds the sources (or problems) of all rows, end to
end; text_ends holds the index after each row's text.
"""


def write_store(folder: Path, parts: Iterable[Sequence[EncodedRow]], read: Rows) -> None:
    """Write encoded rows to a folder, part by part.

    Args:
        folder: an empty folder.
        parts: the rows; only one part is in memory at a time.
        read: the counts of sources and the notes; complete after the last part.

    Raises:
        OSError: when the disk is full.
    """
    num_tokens = num_bytes = num_rows = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in _DTYPES}
        for part in parts:
            # Names of files are not always valid UTF-8.
            texts = [(row.problem or row.source).encode(errors="surrogatepass") for row in part]
            documents = [row.document for row in part if row.document is not None]
            rows = np.array([row.facts for row in part], dtype=ROW)
            ends = num_tokens + np.cumsum(rows["num_tokens"], dtype=np.int64)
            text_ends = num_bytes + np.cumsum([len(text) for text in texts], dtype=np.int64)
            columns = {"rows": rows, "ends": ends, "text_ends": text_ends}
            for name, column in columns.items():
                files[name].write(column.astype(_DTYPES[name]).tobytes())
            files["texts"].write(b"".join(texts))
            for document in documents:
                files["tokens"].write(document.tokens.astype("<i4").tobytes())
                files["supervised"].write(document.supervised.tobytes())
            num_tokens, num_bytes = int(ends[-1]), int(text_ends[-1])
            num_rows += len(part)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    meta = {
        "version": STORE_VERSION,
        "num_rows": num_rows,
        "sizes": {name: (folder / name).stat().st_size for name in _DTYPES},
        "counts": read.counts,
        "notes": read.notes,
    }
    write_bytes(folder / _META, json.dumps(meta).encode())


def open_store(folder: Path) -> Store | None:
    """Open a store; return None if the folder has no complete store."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in _DTYPES}
        if meta["version"] != STORE_VERSION or meta["sizes"] != sizes:
            return None
        return Store(folder, meta)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


class Store:
    """Encoded rows on the disk."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        """Map the files of a folder.

        Raises:
            ValueError: when the sizes of the files do not match.
        """
        mapped = {name: _mapped(folder / name, dtype) for name, dtype in _DTYPES.items()}
        self._tokens, self._supervised = mapped["tokens"], mapped["supervised"]
        self._texts, self._text_ends = mapped["texts"], mapped["text_ends"]
        self._ends = mapped["ends"]
        self.rows: NDArray[Any] = mapped["rows"]
        self.counts: list[int] = meta["counts"]
        self.notes: list[str] = meta["notes"]
        count = meta["num_rows"]
        fits = (
            count == len(self.rows) == len(self._ends) == len(self._text_ends) == sum(self.counts)
            and self._ends[-1] == len(self._tokens) == len(self._supervised)
            and self._text_ends[-1] == len(self._texts)
        )
        if not fits:
            raise ValueError("the files belong to different stores")

    def source(self, row: int) -> str:
        """Return the file:line of a row that can be rendered."""
        start = self._text_ends[row - 1] if row else 0
        text = self._texts[start : self._text_ends[row]].tobytes()
        return text.decode(errors="surrogatepass")

    problem = source
    """Return `file:line: reason` of a row that cannot be rendered."""

    def arrays(self, row: int) -> tuple[Int32, Bool]:
        """Return the (N,) ids of a row's document and their (N,) loss mask; both are read-only."""
        start, end = (self._ends[row - 1] if row else 0), self._ends[row]
        return self._tokens[start:end], self._supervised[start:end]

    def documents(self, rows: NDArray[np.int64]) -> DocumentStore:
        """Return the documents of rows in the given order; each row must have one."""
        return DocumentStore(self, rows)


class DocumentStore(Sequence[Document]):
    """A sequence of documents; each is read from the disk on access."""

    def __init__(self, store: Store, rows: NDArray[np.int64]) -> None:
        """Choose documents.

        Args:
            store: the store of the documents.
            rows: (D,) rows of the documents.
        """
        self.store = store
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> DocumentStore: ...

    def __getitem__(self, index: int | slice) -> Document | DocumentStore:
        if isinstance(index, slice):
            return DocumentStore(self.store, self.rows[index])
        row = int(self.rows[index])
        facts = self.store.rows[row]
        flags = int(facts["flags"])
        remarks = Remarks(
            bool(flags & HAS_MARKER_TEXT), int(facts["num_stripped"]), bool(flags & SYSTEM_DROPPED)
        )
        return Document(*self.store.arrays(row), self.store.source(row), remarks)


def document_lengths(documents: Sequence[Document]) -> NDArray[np.int64]:
    """Return the (D,) lengths of documents, without reading documents on the disk."""
    if isinstance(documents, DocumentStore):
        return documents.store.rows["num_tokens"][documents.rows].astype(np.int64)
    return np.array([len(d.tokens) for d in documents], dtype=np.int64)


def num_loss_tokens(documents: Sequence[Document]) -> int:
    """Count the supervised tokens of documents, without reading documents on the disk."""
    if isinstance(documents, DocumentStore):
        return int(documents.store.rows["loss_tokens"][documents.rows].sum(dtype=np.int64))
    return sum(d.loss_tokens for d in documents)


def _mapped(path: Path, dtype: Any) -> NDArray[Any]:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
