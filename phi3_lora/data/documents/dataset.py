"""A data source as documents ready for training or scoring, with what was left out counted."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phi3_lora.arrays import Bool
from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents.cache import encoded_sources
from phi3_lora.data.documents.encoding import Encoding, InMemory, encode_in_parts
from phi3_lora.data.documents.mixing import copies
from phi3_lora.data.documents.selection import Dataset, Selection
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.data.sources.source import Source, check_exists, with_split
from phi3_lora.engine.random_streams import permutation
from phi3_lora.errors import DataError
from phi3_lora.storage.cache import Note

_VALID = "validation data"


@dataclass(frozen=True, slots=True)
class DataFiles:
    """Which sources a run's data settings mean."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...]
    """Empty where there is nothing to validate on."""


def resolve_data(
    data: str | Source,
    valid: str | None = None,
    *,
    more: Sequence[Source] = (),
) -> DataFiles:
    """What to train and to validate on.

    Args:
        data: `demo`, a file, a folder, a pattern, a data set of the hub, or empty.
        valid: the same, to validate on; the default is the validation split beside data, if any.
        more: other sources to train on.

    Raises:
        DataError: when one of them does not exist.
    """
    first = data if isinstance(data, Source) else Source(path=data) if data else None
    train = tuple(source for source in (first, *more) if source is not None)
    for source in train:
        check_exists(source)
    if valid:
        like = first or Source(path=valid)
        chosen = dataclasses.replace(
            like,
            path=valid,
            split=None,
            subset=None,
        )
        check_exists(chosen)
        return DataFiles(train, (chosen,))
    beside = None if first is None else with_split(first, "valid")
    return DataFiles(train, () if beside is None else (beside,))


def resolve_scoring_file(data: str | Source) -> tuple[Source, ...]:
    """What to score: of a folder, a data set or `demo` the validation split, else the test split.

    Raises:
        DataError: when it does not exist.
    """
    source = data if isinstance(data, Source) else Source(path=data)
    check_exists(source)
    return (with_split(source, "valid") or with_split(source, "test") or source,)


def build_dataset(
    rows: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    name: str,
    context: int | None = None,
    loss_on: str = "assistant",
    too_long: str = "drop",
    on_bad_row: str = "error",
) -> Dataset:
    """Rows as documents; what is left out, shortened or changed is counted and named.

    Args:
        rows: conversations.
        tokenizer: the base model's.
        max_length: tokens that a document may have.
        name: what to call this data in notes.
        context: tokens the model takes (max_position_embeddings); no document may be longer.
        loss_on: what the loss counts on: assistant, last or all; a row's own weights win.
        too_long: what becomes of longer rows: drop, truncate_left, truncate_right or error.
        on_bad_row: what becomes of rows that cannot be rendered: error or skip.

    Raises:
        DataError: when nothing is left to learn from; when rows are too long or cannot be
            rendered, and that is to be an error.
    """
    encoding, limit = encoding_of(
        max_length, context, loss_on=loss_on, too_long=too_long, on_bad_row=on_bad_row
    )
    parts = encode_in_parts(rows, tokenizer, encoding)
    encoded = InMemory([*itertools.chain.from_iterable(parts)])
    index = np.arange(len(encoded.rows))
    return Selection(encoded, encoding, limit, tokenizer.notes).dataset(index, name)


def encoding_of(max_length: int, context: int | None, **choices: str) -> tuple[Encoding, str]:
    """How rows become documents (Encoding, its choices by name), and what to call their limit."""
    if context is not None and context < max_length:
        return Encoding(limit=context, **choices), f"the model's context of {context:,} tokens"
    return Encoding(limit=max_length, **choices), f"max_length {max_length:,} tokens"


def load_splits(
    files: DataFiles,
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    valid_fraction: float,
    seed: int,
    context: int | None = None,
    loss_on: str = "assistant",
    too_long: str = "drop",
    on_bad_row: str = "error",
    note: Note = lambda text: None,
) -> tuple[Dataset, Dataset | None]:
    """The training and validation documents.

    Validation sources win over valid_fraction, which takes that share of the training rows,
    chosen by the seed. The weights of sources say how often an epoch takes what is left of them.
    Large files are tokenised once, into a cache, and note is told where. The rest is as
    build_dataset and read_rows have it.

    Raises:
        StorageError: when the cache cannot be written.
    """
    encoding, limit = encoding_of(
        max_length, context, loss_on=loss_on, too_long=too_long, on_bad_row=on_bad_row
    )
    rows = encoded_sources(files.train, tokenizer, encoding, note)
    is_valid = np.zeros(len(rows.rows), dtype=bool)
    valid = None
    if files.valid:
        valid = load_split(files.valid, tokenizer, encoding, limit, note=note)
    elif valid_fraction > 0:
        is_valid = _chosen_share(len(is_valid), valid_fraction, seed)
        selection = Selection(rows, encoding, limit, tokenizer.notes)
        valid = selection.dataset(np.flatnonzero(is_valid), _VALID)
    times = copies([source.weight for source in files.train], rows.counts, is_valid, seed)
    index = np.repeat(np.arange(len(times)), times)
    train = Selection(rows, encoding, limit, tokenizer.notes).dataset(index, "training data")
    return _with_notes(train, rows.notes), valid


def load_split(
    sources: Sequence[Source],
    tokenizer: ChatTokenizer,
    encoding: Encoding,
    limit: str,
    *,
    name: str = _VALID,
    note: Note = lambda text: None,
) -> Dataset:
    """All documents of sources.

    Args:
        sources: what to read; weights do not count.
        tokenizer: the base model's.
        encoding: how rows become documents.
        limit: what the limit of tokens is called.
        name: what to call the rows in notes.
        note: told where the tokens of large files lie.

    Raises:
        DataError: as load_splits.
        StorageError: when the cache cannot be written.
    """
    rows = encoded_sources(sources, tokenizer, encoding, note)
    selection = Selection(rows, encoding, limit, tokenizer.notes)
    return _with_notes(selection.dataset(np.arange(len(rows.rows)), name), rows.notes)


def _with_notes(dataset: Dataset, notes: Sequence[str]) -> Dataset:
    return dataclasses.replace(dataset, notes=[*notes, *dataset.notes])


def _chosen_share(count: int, fraction: float, seed: int) -> Bool:
    """Which rows are set aside, (count,)."""
    num_chosen = round(count * fraction)
    if not 0 < num_chosen < count:
        raise DataError(
            f"valid_fraction {fraction} of {count} rows leaves one side empty: "
            "use more rows or another fraction"
        )
    chosen = np.zeros(count, dtype=bool)
    chosen[permutation(seed, "valid", size=count)[:num_chosen]] = True
    return chosen
