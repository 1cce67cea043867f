"""Cache of tokens: large data is tokenised once, and later runs with equal settings read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents.encoding import EncodedRows, Encoding, InMemory, encode_in_parts
from phi3_lora.data.documents.store import STORE_VERSION, open_store, write_store
from phi3_lora.data.sources.reading import Rows, read_rows, usable_rows
from phi3_lora.data.sources.source import Source, parts_of
from phi3_lora.errors import DataError, StorageError
from phi3_lora.storage.atomic import replace_folder
from phi3_lora.storage.cache import Note, cache_root, found_or_made

CACHE_FROM_BYTES = 64 * 2**20
"""Total size of files from which the cache is used; smaller data is tokenised in memory."""


def encoded_sources(
    sources: Sequence[Source], tokenizer: ChatTokenizer, encoding: Encoding, note: Note
) -> EncodedRows:
    """Encode the rows of sources in memory, or through the cache if the files are large.

    Args:
        sources: sources to read.
        tokenizer: the base model's tokenizer.
        encoding: settings of the encoding.
        note: receives the cache folder.

    Raises:
        DataError: as in read_rows, and when a file changes while it is read.
        StorageError: when the cache cannot be written.
    """
    files = _files(sources)
    # A template that writes the date gives other tokens tomorrow.
    is_stable = "strftime_now" not in tokenizer.template.source
    if files is None or not is_stable or _size(files) < CACHE_FROM_BYTES:
        rows = read_rows(sources, on_bad_row=encoding.on_bad_row)
        parts = encode_in_parts(rows.conversations, tokenizer, encoding)
        return InMemory([*chain.from_iterable(parts)], rows.counts, rows.notes)
    key = _key(sources, files, tokenizer, encoding)
    names = ", ".join(map(str, sources))
    target = cache_root() / "tokens" / key

    def make() -> None:
        note(f"tokenising {names}, once, into {target}")

        def fill(folder: Path) -> None:
            read = Rows()
            rows = usable_rows(sources, read, on_bad_row=encoding.on_bad_row)
            write_store(folder, encode_in_parts(rows, tokenizer, encoding), read)
            # Files may also have been added or removed.
            if _key(sources, _files(sources) or (), tokenizer, encoding) != key:
                raise DataError(f"{names} changed while being read: run again when it is complete")

        replace_folder(target, fill)

    waiting = f"waiting for another process that is tokenising {names}"
    store, is_new = found_or_made(
        target, lambda: open_store(target), make, waiting=waiting, note=note
    )
    if store is None:
        raise StorageError(f"{target} cannot be read back: check the disk")
    if not is_new:
        note(f"tokens of {names} found in {target}")
    return store


def _files(sources: Sequence[Source]) -> list[tuple[int, Path]] | None:
    """Return each file with the index of its source; None if a source has rows outside of files."""
    found: list[tuple[int, Path]] = []
    for i, source in enumerate(sources):
        for part in parts_of(source):
            files = part.files()
            if files is None:
                return None
            found += [(i, path) for path in files]
    return found


def _size(files: Sequence[tuple[int, Path]]) -> int:
    return sum(path.stat().st_size for _, path in files)


def _key(
    sources: Sequence[Source],
    files: Sequence[tuple[int, Path]],
    tokenizer: ChatTokenizer,
    encoding: Encoding,
) -> str:
    """Hash everything that the documents, their sources and the notes depend on."""
    listed: list[Any] = []
    for i, path in files:
        status = path.resolve().stat()
        place = str(path), str(path.resolve())
        listed.append([i, *place, status.st_size, status.st_mtime_ns])
    read_as = [{**asdict(source), "weight": None} for source in sources]
    settings = [STORE_VERSION, tokenizer.identity, encoding.identity(), read_as, listed]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
