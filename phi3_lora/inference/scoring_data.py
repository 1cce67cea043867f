"""What a model is scored on: documents, and where they are to be answered their conversations."""

from __future__ import annotations

from typing import NamedTuple

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents.dataset import (
    build_dataset,
    encoding_of,
    load_split,
    resolve_scoring_file,
)
from phi3_lora.data.documents.selection import Dataset
from phi3_lora.data.options import LOSS_ON, ON_BAD_ROW
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.data.sources.reading import Rows, usable_rows
from phi3_lora.data.sources.source import Source
from phi3_lora.errors import ConfigError
from phi3_lora.storage.cache import Note

_COUNTED = {
    "last": "the loss counts on the last answer of each row",
    "all": "the loss counts on every token of each row but the first",
}


class ToScore(NamedTuple):
    """Rows to score."""

    dataset: Dataset
    conversations: list[Conversation]
    """The rows that have a document, where they were asked for."""


def load_to_score(
    data: str | Source,
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    context: int,
    loss_on: str = "assistant",
    on_bad_row: str = "error",
    limit: int | None = None,
    with_conversations: bool = False,
    note: Note,
) -> ToScore:
    """Read what to score; large data goes through the cache of tokens.

    Args:
        data: as resolve_scoring_file.
        tokenizer: the base model's.
        max_length: tokens that a document may have.
        context: tokens the model takes.
        loss_on: assistant, last or all.
        on_bad_row: error or skip.
        limit: score the first rows only, which are then kept in memory.
        with_conversations: keep the conversations in memory, too.
        note: told what was left out, and where the tokens of large data lie.

    Raises:
        ConfigError: when a setting is none of its values.
        DataError: when data cannot be used.
        StorageError: when the cache cannot be written.
    """
    _check_choice("loss_on", loss_on, LOSS_ON)
    _check_choice("on_bad_row", on_bad_row, ON_BAD_ROW)
    sources = resolve_scoring_file(data)
    if loss_on in _COUNTED:
        note(_COUNTED[loss_on])
    if limit is None and not with_conversations:
        encoding, longest = encoding_of(max_length, context, loss_on=loss_on, on_bad_row=on_bad_row)
        dataset = load_split(sources, tokenizer, encoding, longest, name=str(data), note=note)
        for text in dataset.notes:
            note(text)
        return ToScore(dataset, [])
    told = Rows()
    rows = usable_rows(sources, told, on_bad_row=on_bad_row)
    # All are read, so that every bad row is told, but no more are kept than are scored.
    first = [row for i, row in enumerate(rows) if limit is None or i < limit]
    dataset = build_dataset(
        first,
        tokenizer,
        max_length=max_length,
        name=str(data),
        context=context,
        loss_on=loss_on,
        on_bad_row=on_bad_row,
    )
    for text in [*told.notes, *dataset.notes]:
        note(text)
    if not with_conversations:
        return ToScore(dataset, [])
    scored = {document.source for document in dataset.documents}
    return ToScore(dataset, [row for row in first if row.source in scored])


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
