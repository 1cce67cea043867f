"""Encoded rows as a data set, with what was left out, shortened or changed counted and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phi3_lora.data.encoding import (
    HAS_MARKER_TEXT,
    LACKS_SYSTEM,
    SHORTENED,
    TOO_LONG,
    UNRENDERED,
    EncodedRows,
    Encoding,
)
from phi3_lora.data.store import document_lengths, num_loss_tokens
from phi3_lora.data.tokenizer import Document
from phi3_lora.errors import MAX_SHOWN, DataError, listing

Index = NDArray[np.int64]
"""Numbers of rows."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Documents of one split."""

    documents: Sequence[Document]
    notes: list[str] = field(default_factory=list)
    """What was left out and why, for the user."""

    @property
    def loss_tokens(self) -> int:
        """Supervised tokens of all documents."""
        return num_loss_tokens(self.documents)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(document_lengths(self.documents).sum())


@dataclass(frozen=True, slots=True)
class Selection:
    """Encoded rows of which some become a data set."""

    encoded: EncodedRows
    encoding: Encoding
    limit: str
    """What the limit is called in messages."""
    notes: Sequence[str]
    """On the chat template."""

    def dataset(self, index: Index, name: str) -> Dataset:
        """The documents of rows, in the order given, and notes on those that are left out.

        Args:
            index: the rows; one may come more than once.
            name: what to call them in notes.

        Raises:
            DataError: when nothing is left to learn from; when rows are too long or cannot be
                rendered, and that is to be an error.
        """
        notes = [*self.notes]
        unrendered, index = self._split(index, UNRENDERED)
        if len(unrendered):
            notes.append(self._not_rendered(unrendered, name))
        total = len(index)
        if self.encoding.too_long == "error":
            self._refuse_longer(index, f"{name}: longer than {self.limit}")
        shortened, _ = self._split(index, SHORTENED)
        dropped, index = self._split(index, TOO_LONG)
        is_heard = self.encoded.rows["loss_tokens"][index] > 0
        silent, index = index[~is_heard], index[is_heard]
        longest = int(self.encoded.rows["length"][dropped].max(initial=0))
        how = f"{self.encoding.too_long}; "
        counts = (
            ("shortened", shortened, f"longer than {self.limit} by whole turns", how),
            ("dropped", dropped, f"longer than {self.limit}", f"longest {longest:,}; "),
            ("dropped", silent, "without a supervised token", ""),
        )
        notes += [
            f"{name}: {verb} {len(found):,} of {total:,} rows {what} "
            f"({detail}first {self._first(found)})"
            for verb, found, what, detail in counts
            if len(found)
        ]
        notes += self._remarks(index, name)
        if not len(index):
            raise DataError(listing(f"{name}: no row is left to learn from", notes))
        return Dataset(self.encoded.documents(index), notes)

    def _first(self, index: Index) -> str:
        return self.encoded.source(int(index[0]))

    def _split(self, index: Index, flag: int) -> tuple[Index, Index]:
        """Rows with a flag, and the others."""
        has = (self.encoded.rows["flags"][index] & flag) != 0
        return index[has], index[~has]

    def _not_rendered(self, index: Index, name: str) -> str:
        texts = [self.encoded.problem(int(i)) for i in index[:MAX_SHOWN]]
        if self.encoding.on_bad_row == "error":
            title = f"{len(index):,} row(s) cannot be rendered:"
            raise DataError(listing(title, texts, total=len(index)))
        title = f"{name}: skipped {len(index):,} row(s) that cannot be rendered:"
        return listing(title, texts, total=len(index))

    def _refuse_longer(self, index: Index, title: str) -> None:
        longer, _ = self._split(index, TOO_LONG)
        if not len(longer):
            return
        texts = [
            f"{self.encoded.source(int(i))}: {self.encoded.rows['length'][i]:,} tokens"
            for i in longer[:MAX_SHOWN]
        ]
        raise DataError(
            listing(
                f"{title}: {len(longer):,} of {len(index):,} rows. Shorten them, raise the "
                "limit (--max-length), or set data.too_long to drop, truncate_left or "
                "truncate_right:",
                texts,
                total=len(longer),
            )
        )

    def _remarks(self, index: Index, name: str) -> list[str]:
        """What was noticed in rows that are kept, each kind counted."""
        num_eaten = self.encoded.rows["num_eaten"][index]
        characters = int(num_eaten.sum(dtype=np.int64))
        marked, _ = self._split(index, HAS_MARKER_TEXT)
        systemless, _ = self._split(index, LACKS_SYSTEM)
        texts = (
            (marked, "hold markers as text, kept as text", ""),
            (
                index[num_eaten > 0],
                "lose white space that markers beside a message eat",
                f"{characters:,} in all; ",
            ),
            (systemless, "lose their system message: the chat template has no place for it", ""),
        )
        return [
            f"{name}: {len(found):,} of {len(index):,} rows {text} "
            f"({detail}first {self._first(found)})"
            for found, text, detail in texts
            if len(found)
        ]
