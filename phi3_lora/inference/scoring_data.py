"""Reading of rows to score: documents and, on request, their conversations."""

from __future__ import annotations

from typing import NamedTuple

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents.dataset import build_dataset, load_split, resolve_scoring_file
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.selection import Dataset
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.data.sources.in_memory import Data, as_source
from phi3_lora.data.sources.reading import Rows, usable_rows
from phi3_lora.storage.cache import Note

_COUNTED = {
    "last": "the loss counts on the last answer of each row",
    "all": "the loss counts on every token of each row but the first",
}


class ToScore(NamedTuple):
    """Documents to score, and their conversations."""

    dataset: Dataset
    conversations: list[Conversation]
    """The rows that have a document; empty unless asked for."""


def load_to_score(
    data: Data,
    tokenizer: ChatTokenizer,
    encoding: Encoding,
    *,
    limit: int | None = None,
    with_conversations: bool = False,
    note: Note,
) -> ToScore:
    """Read the rows to score; large data is read through the cache of tokens.

    Args:
        data: rows to score; a folder, a data set and `demo` give one split, as in
            resolve_scoring_file.
        tokenizer: the base model's tokenizer.
        encoding: settings of the encoding.
        limit: number of first rows to score; they are kept in memory.
        with_conversations: True to keep the conversations in memory, too.
        note: receives notes on rows that were left out, and the cache folder of large data.

    Raises:
        DataError: when data cannot be used.
        StorageError: when the cache cannot be written.
    """
    name = str(as_source(data))
    sources = resolve_scoring_file(data)
    if encoding.loss_on in _COUNTED:
        note(_COUNTED[encoding.loss_on])
    if limit is None and not with_conversations:
        dataset = load_split(sources, tokenizer, encoding, name=name, note=note)
        for text in dataset.notes:
            note(text)
        return ToScore(dataset, [])
    read = Rows()
    rows = usable_rows(sources, read, on_bad_row=encoding.on_bad_row)
    # All rows are read, so that every bad row is reported; only the first rows are kept.
    first = [row for i, row in enumerate(rows) if limit is None or i < limit]
    dataset = build_dataset(first, tokenizer, encoding, name)
    for text in [*read.notes, *dataset.notes]:
        note(text)
    if not with_conversations:
        return ToScore(dataset, [])
    scored = {document.source for document in dataset.documents}
    return ToScore(dataset, [row for row in first if row.source in scored])
