"""Selection of encoded rows as a data set, with counts of rows left out, shortened or changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents import tally as tallies
from phi3_lora.data.documents.encoding import (
    HAS_MARKER_TEXT,
    SHORTENED,
    SYSTEM_DROPPED,
    TOO_LONG,
    UNRENDERED,
    EncodedRows,
    Encoding,
)
from phi3_lora.data.documents.tally import Tally
from phi3_lora.errors import MAX_SHOWN, DataError, listing

NOTHING_LEFT = (
    "no row is left to learn from; shorten rows, raise --max-length or set data.too_long, and look "
    "at data.loss_on and weights of 0 (phi3-lora data check lists the problems of each row)"
)
Index = NDArray[np.int64]
"""Indices of rows."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Documents of one split."""

    documents: Sequence[Document]
    notes: list[str] = field(default_factory=list)
    """Notes for the user on rows that are left out, shortened or changed."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Encoded rows, with methods that choose the trainable ones."""

    encoded: EncodedRows
    encoding: Encoding
    notes: Sequence[str]
    """Notes on the chat template."""

    def dataset(self, index: Index, name: str) -> Dataset:
        """Return the documents of rows in the given order, with notes on rows that are left out.

        Args:
            index: indices of the rows; a row may occur more than once.
            name: name of the rows in notes.

        Raises:
            DataError: when no trainable row is left; and as in choose.
        """
        index, tally = self.choose(index, name)
        notes = [*self.notes, *notes_on(tally, name, self.encoding)]
        if not len(index):
            raise DataError(listing(f"{name}: {NOTHING_LEFT}", notes))
        return Dataset(self.encoded.documents(index), notes)

    def choose(self, index: Index, name: str) -> tuple[Index, Tally]:
        """Return the trainable rows and a tally of every outcome.

        Args:
            index: indices of the rows; a row may occur more than once.
            name: name of the rows in messages.

        Raises:
            DataError: when rows are too long or cannot be rendered, and the encoding makes that an
                error.
        """
        num_rows = len(index)
        unrendered, index = self._split(index, UNRENDERED)
        problems = [self.encoded.problem(int(i)) for i in unrendered[:MAX_SHOWN]]
        if problems and self.encoding.on_bad_row == "error":
            title = f"{len(unrendered):,} row(s) cannot be rendered:"
            raise DataError(listing(title, problems, total=len(unrendered)))
        if self.encoding.too_long == "error":
            self._refuse_longer(index, f"{name}: longer than {self.encoding.limit_name} tokens")
        shortened, _ = self._split(index, SHORTENED)
        dropped, index = self._split(index, TOO_LONG)
        rows = self.encoded.rows
        is_heard = rows["loss_tokens"][index] > 0
        silent, index = index[~is_heard], index[is_heard]
        num_stripped = rows["num_stripped"][index]
        tally = Tally(
            num_rows,
            int(rows["length"][dropped].max(initial=0)),
            int(num_stripped.sum(dtype=np.int64)),
        )
        found = {
            tallies.SHORTENED: shortened,
            tallies.DROPPED: dropped,
            tallies.NO_LOSS_TOKENS: silent,
            tallies.HAS_MARKER_TEXT: self._split(index, HAS_MARKER_TEXT)[0],
            tallies.STRIPPED_WHITESPACE: index[num_stripped > 0],
            tallies.SYSTEM_DROPPED: self._split(index, SYSTEM_DROPPED)[0],
        }
        tally = tally.plus(tallies.UNRENDERED, len(unrendered), problems)
        for kind, some in found.items():
            first = [self.encoded.source(int(i)) for i in some[:1]]
            tally = tally.plus(kind, len(some), first)
        return index, tally

    def _split(self, index: Index, flag: int) -> tuple[Index, Index]:
        """Split rows into rows with a flag and rows without it."""
        has = (self.encoded.rows["flags"][index] & flag) != 0
        return index[has], index[~has]

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


def notes_on(tally: Tally, name: str, encoding: Encoding) -> list[str]:
    """Return a note for the user on each outcome in a tally.

    Args:
        tally: the outcomes of the rows.
        name: name of the rows in notes.
        encoding: settings of their encoding.
    """
    return tally.notes(name, limit=f"{encoding.limit_name} tokens", too_long=encoding.too_long)
