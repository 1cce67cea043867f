"""A data source as documents ready for training or scoring, with what was left out counted."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phi3_lora.backend import Batch
from phi3_lora.data.records import Conversation, read_conversations
from phi3_lora.data.tokenizer import ChatTokenizer, Document
from phi3_lora.demo import DEMO_DATA_DIR
from phi3_lora.errors import DataError, listing
from phi3_lora.seeding import permutation


@dataclass(frozen=True, slots=True)
class DataFiles:
    """Which files a --data value means."""

    train: Path
    valid: Path | None


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


def resolve_data(data: str, valid: str | None = None) -> DataFiles:
    """The files of `demo`, a JSONL file, or a folder with train.jsonl (and valid.jsonl).

    Raises:
        DataError: when a file does not exist.
    """
    root = DEMO_DATA_DIR if data == "demo" else Path(data)
    if root.is_dir():
        train, found = root / "train.jsonl", root / "valid.jsonl"
        beside = found if found.exists() else None
    else:
        train, beside = root, None
    chosen = Path(valid) if valid else beside
    for path in (train, chosen):
        if path is not None and not path.is_file():
            raise DataError(f"no such data file: {path}")
    return DataFiles(train, chosen)


def resolve_scoring_file(data: str) -> Path:
    """The file to score: the validation file of a folder or of `demo`, else the file itself.

    Raises:
        DataError: when it does not exist.
    """
    files = resolve_data(data)
    return files.valid or files.train


def build_dataset(
    rows: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    name: str,
    context: int | None = None,
) -> Dataset:
    """Rows as documents; too long and unsupervised ones are dropped, counted and named.

    Args:
        rows: conversations.
        tokenizer: the base model's.
        max_length: tokens; longer documents are dropped.
        name: what to call this data in notes.
        context: tokens the model takes (max_position_embeddings); no document may be longer.

    Raises:
        DataError: when nothing is left to learn from.
    """
    limit = "max_length"
    if context is not None and context < max_length:
        max_length, limit = context, "the model's context of"
    documents = tokenizer.encode_conversations(rows)
    too_long = [d for d in documents if len(d.tokens) > max_length]
    fitting = [d for d in documents if len(d.tokens) <= max_length]
    silent = [d for d in fitting if d.loss_tokens == 0]
    kept = [d for d in fitting if d.loss_tokens > 0]
    notes = []
    if too_long:
        longest = max(len(d.tokens) for d in too_long)
        notes.append(
            f"{name}: dropped {len(too_long):,} of {len(documents):,} rows longer than {limit} "
            f"{max_length:,} tokens (longest {longest:,}; first {too_long[0].source})"
        )
    if silent:
        notes.append(
            f"{name}: dropped {len(silent):,} of {len(documents):,} rows without a supervised "
            f"token (first {silent[0].source})"
        )
    if not kept:
        raise DataError(listing(f"{name}: no row is left to learn from", notes))
    return Dataset(kept, notes)


def load_splits(
    files: DataFiles,
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    valid_fraction: float,
    seed: int,
    context: int | None = None,
) -> tuple[Dataset, Dataset | None]:
    """The training and validation documents.

    A validation file wins over valid_fraction, which takes that share of the training rows,
    chosen by the seed.
    """
    rows = read_conversations(files.train)
    valid_rows: list[Conversation] = []
    if files.valid is not None:
        valid_rows = read_conversations(files.valid)
    elif valid_fraction > 0:
        rows, valid_rows = _split(rows, valid_fraction, seed)
    build = functools.partial(
        build_dataset, tokenizer=tokenizer, max_length=max_length, context=context
    )
    train = build(rows, name="training data")
    return train, build(valid_rows, name="validation data") if valid_rows else None


def _split(
    rows: Sequence[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    count = round(len(rows) * fraction)
    if not 0 < count < len(rows):
        raise DataError(
            f"valid_fraction {fraction} of {len(rows)} rows leaves one side empty: "
            "use more rows or another fraction"
        )
    chosen = set(permutation(seed, "valid", size=len(rows))[:count].tolist())
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [row for i, row in enumerate(rows) if i in chosen]


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
