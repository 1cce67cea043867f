"""Counts of the outcomes of rows; the tallies of parts add up to the tally of the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phi3_lora.data.options import TooLong
from phi3_lora.errors import MAX_SHOWN, listing

BAD, UNRENDERED = "bad", "unrendered"
SHORTENED, DROPPED, NO_LOSS_TOKENS = "shortened", "dropped", "silent"
HAS_MARKER_TEXT, STRIPPED_WHITESPACE = "marked", "eaten"
SYSTEM_DROPPED, LEAKED = "systemless", "leaked"
"""Outcomes of rows. Checkpoints store these strings."""
_KEY_OF = {"num_stripped": "num_eaten"}
"""Field -> its key in a checkpoint, where they differ."""
_FIELD_OF = {key: name for name, key in _KEY_OF.items()}
_LISTED = (BAD, UNRENDERED)
"""Outcomes with a list of the first MAX_SHOWN rows; other outcomes list the first row only."""
_LEFT_OUT = {BAD: "bad row(s)", UNRENDERED: "row(s) that cannot be rendered"}


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of the outcomes of rows."""

    num_rows: int = 0
    """All rows, whatever their outcome."""
    longest: int = 0
    """Tokens of the longest row that does not fit."""
    num_stripped: int = 0
    """White-space characters in kept rows that neighbouring markers strip."""
    counts: dict[str, int] = field(default_factory=dict)
    """Outcome -> number of rows."""
    first: dict[str, list[str]] = field(default_factory=dict)
    """Outcome -> file:line of the first row; for unusable rows `file:line: reason` of several."""

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as a checkpoint stores them."""
        values = dataclasses.asdict(self)
        return {_KEY_OF.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tally:
        """Restore a tally from the values that to_dict returned.

        Raises:
            ValueError: when the values are not the values of a tally.
        """
        try:
            renamed = {_FIELD_OF.get(key, key): value for key, value in values.items()}
            tally = cls(**renamed)
            numbers = [tally.num_rows, tally.longest, tally.num_stripped, *tally.counts.values()]
            named = [tally.first[kind] for kind in tally.counts]
        except (TypeError, AttributeError, KeyError) as cause:
            raise ValueError(f"not counts of rows: {cause}") from None
        are_numbers = all(type(number) is int and number >= 0 for number in numbers)
        if not are_numbers or not all(isinstance(n, list) and n for n in named):
            raise ValueError(f"not counts of rows: {values}")
        return tally

    def __add__(self, later: Tally) -> Tally:
        counts, first = dict(self.counts), dict(self.first)
        for kind, count in later.counts.items():
            shown = MAX_SHOWN if kind in _LISTED else 1
            counts[kind] = counts.get(kind, 0) + count
            first[kind] = [*first.get(kind, []), *later.first[kind]][:shown]
        return Tally(
            self.num_rows + later.num_rows,
            max(self.longest, later.longest),
            self.num_stripped + later.num_stripped,
            counts,
            first,
        )

    def plus(self, kind: str, count: int, first: Sequence[str]) -> Tally:
        """Return the tally with more rows of one outcome; num_rows stays."""
        return self + Tally(counts={kind: count}, first={kind: [*first]}) if count else self

    def notes(self, name: str, *, limit: str, too_long: TooLong) -> list[str]:
        """Return a note for the user on each outcome that occurs.

        Args:
            name: name of the rows.
            limit: name of the token limit.
            too_long: treatment of longer rows; not error.
        """
        notes = [
            listing(
                f"{name}: skipped {self.counts[kind]:,} {what}:",
                self.first[kind],
                total=self.counts[kind],
            )
            for kind, what in _LEFT_OUT.items()
            if kind in self.counts
        ]
        rendered = self.num_rows - sum(self.counts.get(kind, 0) for kind in _LISTED)
        kept = rendered - sum(self.counts.get(kind, 0) for kind in (DROPPED, NO_LOSS_TOKENS))
        longer = f"longer than {limit}"
        texts = (
            (SHORTENED, rendered, f"shortened {{}} rows {longer} by whole turns", f"{too_long}; "),
            (DROPPED, rendered, f"dropped {{}} rows {longer}", f"longest {self.longest:,}; "),
            (NO_LOSS_TOKENS, rendered, "dropped {} rows without a supervised token", ""),
            (HAS_MARKER_TEXT, kept, "{} rows hold markers as text, kept as text", ""),
            (
                STRIPPED_WHITESPACE,
                kept,
                "{} rows lose white space that markers beside a message strip",
                f"{self.num_stripped:,} in all; ",
            ),
            (
                SYSTEM_DROPPED,
                kept,
                "{} rows lose their system message: the chat template has no place for it",
                "",
            ),
            (
                LEAKED,
                kept,
                "{} rows are in the validation data, too, so its loss is too low",
                "",
            ),
        )
        for kind, total, text, detail in texts:
            if kind in self.counts:
                what = text.format(f"{self.counts[kind]:,} of {total:,}")
                notes.append(f"{name}: {what} ({detail}first {self.first[kind][0]})")
        return notes
