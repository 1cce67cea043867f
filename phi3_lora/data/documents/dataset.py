"""Data sources as documents for training or scoring, with notes on rows that are left out."""

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
from phi3_lora.data.sources.in_memory import Data, as_source
from phi3_lora.data.sources.source import Source, check_exists, with_split
from phi3_lora.engine.random_streams import permutation
from phi3_lora.errors import DataError
from phi3_lora.storage.cache import Note

_VALID = "validation data"


@dataclass(frozen=True, slots=True)
class DataFiles:
    """The training and validation sources of a run."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...]
    """Empty without validation data."""


def resolve_data(
    data: Data,
    valid: Data | None = None,
    *,
    more: Sequence[Source] = (),
) -> DataFiles:
    """Return the sources to train on and to validate on.

    Args:
        data: `demo`, a file, a folder, a pattern, a data set of the hub, a Source, rows in memory
            (a list, or a `datasets.Dataset`), or an empty text for no data.
        valid: the rows to validate on, in any form of data; they have the format and columns of
            data. The default is the validation split of data, if it has one.
        more: other sources to train on.

    Raises:
        DataError: when a source does not exist or has no rows.
    """
    is_nothing = isinstance(data, str) and not data
    first = None if is_nothing else as_source(data)
    train = tuple(source for source in (first, *more) if source is not None)
    for source in train:
        check_exists(source)
    if valid is not None and not (isinstance(valid, str) and not valid):
        chosen = as_source(valid, "valid rows", like=first)
        check_exists(chosen)
        return DataFiles(train, (chosen,))
    beside = None if first is None else with_split(first, "valid")
    return DataFiles(train, () if beside is None else (beside,))


def resolve_scoring_file(data: Data) -> tuple[Source, ...]:
    """Return the sources to score.

    A folder, a data set or `demo` gives its validation split, or else its test split, if any.

    Raises:
        DataError: when the source does not exist or has no rows.
    """
    source = as_source(data)
    check_exists(source)
    return (with_split(source, "valid") or with_split(source, "test") or source,)


def build_dataset(
    rows: Sequence[Conversation], tokenizer: ChatTokenizer, encoding: Encoding, name: str
) -> Dataset:
    """Encode rows as documents, with notes on rows that are left out, shortened or changed.

    Args:
        rows: conversations.
        tokenizer: the base model's tokenizer.
        encoding: settings of the encoding.
        name: name of the rows in notes.

    Raises:
        DataError: when no trainable row is left, or when rows are too long or cannot be rendered
            and the encoding makes that an error.
    """
    parts = encode_in_parts(rows, tokenizer, encoding)
    encoded = InMemory([*itertools.chain.from_iterable(parts)])
    index = np.arange(len(encoded.rows))
    return Selection(encoded, encoding, tokenizer.notes).dataset(index, name)


def load_splits(
    files: DataFiles,
    tokenizer: ChatTokenizer,
    encoding: Encoding,
    *,
    valid_fraction: float,
    seed: int,
    note: Note = lambda text: None,
) -> tuple[Dataset, Dataset | None]:
    """Read the training and validation documents.

    Validation sources take precedence over valid_fraction. The weight of a source is the number of
    times that an epoch takes each of its training rows. Large files are tokenised once, into a
    cache.

    Args:
        files: the sources.
        tokenizer: the base model's tokenizer.
        encoding: settings of the encoding.
        valid_fraction: share of the training rows to validate on, without validation sources.
        seed: seed of the choice of that share.
        note: receives the cache folder of large files.

    Raises:
        DataError: as in build_dataset and read_rows.
        StorageError: when the cache cannot be written.
    """
    rows = encoded_sources(files.train, tokenizer, encoding, note)
    is_valid = np.zeros(len(rows.rows), dtype=bool)
    valid = None
    if files.valid:
        valid = load_split(files.valid, tokenizer, encoding, note=note)
    elif valid_fraction > 0:
        is_valid = _chosen_share(len(is_valid), valid_fraction, seed)
        selection = Selection(rows, encoding, tokenizer.notes)
        valid = selection.dataset(np.flatnonzero(is_valid), _VALID)
    times = copies([source.weight for source in files.train], rows.counts, is_valid, seed)
    index = np.repeat(np.arange(len(times)), times)
    train = Selection(rows, encoding, tokenizer.notes).dataset(index, "training data")
    return _with_notes(train, rows.notes), valid


def load_split(
    sources: Sequence[Source],
    tokenizer: ChatTokenizer,
    encoding: Encoding,
    *,
    name: str = _VALID,
    note: Note = lambda text: None,
) -> Dataset:
    """Read all documents of sources.

    Args:
        sources: sources to read; their weights are ignored.
        tokenizer: the base model's tokenizer.
        encoding: settings of the encoding.
        name: name of the rows in notes.
        note: receives the cache folder of large files.

    Raises:
        DataError: as in load_splits.
        StorageError: when the cache cannot be written.
    """
    rows = encoded_sources(sources, tokenizer, encoding, note)
    selection = Selection(rows, encoding, tokenizer.notes)
    return _with_notes(selection.dataset(np.arange(len(rows.rows)), name), rows.notes)


def _with_notes(dataset: Dataset, notes: Sequence[str]) -> Dataset:
    return dataclasses.replace(dataset, notes=[*notes, *dataset.notes])


def _chosen_share(count: int, fraction: float, seed: int) -> Bool:
    """Choose the validation rows: (count,) bool."""
    num_chosen = round(count * fraction)
    if not 0 < num_chosen < count:
        raise DataError(
            f"valid_fraction {fraction} of {count} rows leaves one side empty: "
            "use more rows or another fraction"
        )
    chosen = np.zeros(count, dtype=bool)
    chosen[permutation(seed, "valid", size=count)[:num_chosen]] = True
    return chosen
