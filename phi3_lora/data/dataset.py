"""A data source as documents ready for training or scoring, with what was left out counted."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from phi3_lora.backend import Batch, Bool
from phi3_lora.data.lengths import fit_to, refuse_longer
from phi3_lora.data.mixing import copies
from phi3_lora.data.records import Conversation, Rows, read_rows
from phi3_lora.data.sources import Source, check_exists, is_on_hub, with_split
from phi3_lora.data.tokenizer import ChatTokenizer, Document
from phi3_lora.errors import DataError, listing
from phi3_lora.seeding import permutation


@dataclass(frozen=True, slots=True)
class DataFiles:
    """Which sources a run's data settings mean."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...]
    """Empty where there is nothing to validate on."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Documents of one split."""

    documents: list[Document]
    notes: list[str] = field(default_factory=list)
    """What was left out and why, for the user."""

    @property
    def loss_tokens(self) -> int:
        """Supervised tokens of all documents."""
        return sum(d.loss_tokens for d in self.documents)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(len(d.tokens) for d in self.documents)


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
            streaming=like.streaming and is_on_hub(Source(path=valid)),
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
    limit = f"max_length {max_length:,} tokens"
    if context is not None and context < max_length:
        max_length, limit = context, f"the model's context of {context:,} tokens"
    pairs, notes = _encoded(rows, tokenizer, loss_on, on_bad_row, name)
    if too_long == "error":
        refuse_longer([d for _, d in pairs], max_length, f"{name}: longer than {limit}")
    fit = fit_to(pairs, tokenizer, limit=max_length, too_long=too_long, loss_on=loss_on)
    kept = [d for d in fit.documents if d.loss_tokens > 0]
    silent = [d for d in fit.documents if d.loss_tokens == 0]
    counts = (
        ("shortened", fit.shortened, f"longer than {limit} by whole turns", f"{too_long}; "),
        ("dropped", fit.dropped, f"longer than {limit}", f"longest {_longest(fit.dropped):,}; "),
        ("dropped", silent, "without a supervised token", ""),
    )
    for verb, found, what, detail in counts:
        if found:
            notes.append(
                f"{name}: {verb} {len(found):,} of {len(pairs):,} rows {what} "
                f"({detail}first {found[0].source})"
            )
    notes += _remarks(kept, name)
    if not kept:
        raise DataError(listing(f"{name}: no row is left to learn from", notes))
    return Dataset(kept, notes)


def _longest(documents: Sequence[Document]) -> int:
    return max((len(d.tokens) for d in documents), default=0)


def _encoded(
    rows: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    loss_on: str,
    on_bad_row: str,
    name: str,
) -> tuple[list[tuple[Conversation, Document]], list[str]]:
    """Each row that can be rendered with its document, and notes on the others."""
    notes = list(tokenizer.notes)
    if on_bad_row == "error":
        documents = tokenizer.encode_conversations(rows, loss_on=loss_on)
        return list(zip(rows, documents, strict=True)), notes
    found, problems = tokenizer.encode_rows(rows, loss_on=loss_on)
    if problems:
        title = f"{name}: skipped {len(problems):,} row(s) that cannot be rendered:"
        notes.append(listing(title, problems))
    return [(r, d) for r, d in zip(rows, found, strict=True) if d is not None], notes


def _remarks(documents: Sequence[Document], name: str) -> list[str]:
    """What was noticed in rows that are kept, each kind counted."""
    marked = [d for d in documents if d.remarks.has_marker_text]
    eaten = [d for d in documents if d.remarks.num_eaten]
    systemless = [d for d in documents if d.remarks.lacks_system]
    characters = sum(d.remarks.num_eaten for d in eaten)
    texts = (
        (marked, "hold markers as text, kept as text", ""),
        (eaten, "lose white space that markers beside a message eat", f"{characters:,} in all; "),
        (systemless, "lose their system message: the chat template has no place for it", ""),
    )
    return [
        f"{name}: {len(found):,} of {len(documents):,} rows {text} "
        f"({detail}first {found[0].source})"
        for found, text, detail in texts
        if found
    ]


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
) -> tuple[Dataset, Dataset | None]:
    """The training and validation documents.

    Validation sources win over valid_fraction, which takes that share of the training rows,
    chosen by the seed. The weights of sources say how often an epoch takes what is left of them.
    The rest is as build_dataset and read_rows have it.
    """
    build = functools.partial(
        build_dataset,
        tokenizer=tokenizer,
        max_length=max_length,
        context=context,
        loss_on=loss_on,
        too_long=too_long,
        on_bad_row=on_bad_row,
    )
    rows = read_rows(files.train, on_bad_row=on_bad_row)
    is_valid = np.zeros(len(rows.conversations), dtype=bool)
    valid_rows = Rows()
    if files.valid:
        valid_rows = read_rows(files.valid, on_bad_row=on_bad_row)
    elif valid_fraction > 0:
        is_valid = _chosen_share(len(is_valid), valid_fraction, seed)
        valid_rows.conversations = [rows.conversations[i] for i in np.flatnonzero(is_valid)]
    times = copies([source.weight for source in files.train], rows.counts, is_valid, seed)
    taken = [row for row, n in zip(rows.conversations, times, strict=True) for _ in range(n)]
    train = _with_notes(build(taken, name="training data"), rows.notes)
    if not valid_rows.conversations:
        return train, None
    return train, _with_notes(
        build(valid_rows.conversations, name="validation data"), valid_rows.notes
    )


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


def make_batch(documents: Sequence[Document]) -> Batch:
    """Documents laid end to end, with each token's target and whether it counts."""
    lengths = [len(d.tokens) for d in documents]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = np.concatenate([d.tokens for d in documents]).astype(np.int32)
    supervised = np.concatenate([d.supervised for d in documents])
    targets = np.append(tokens[1:], 0).astype(np.int32)
    mask = np.append(supervised[1:], False)
    last = starts[1:] - 1
    targets[last], mask[last] = 0, False
    return Batch(tokens, targets, mask, starts)


def documents_digest(documents: Sequence[Document]) -> str:
    """sha256 over all token ids and masks, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document.tokens).to_bytes(8, "little"))
        digest.update(document.tokens.astype("<i4").tobytes())
        digest.update(np.packbits(document.supervised).tobytes())
    return digest.hexdigest()
