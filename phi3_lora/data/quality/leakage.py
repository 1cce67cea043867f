"""Rows to validate on that are in the training data, too: their loss says nothing."""

from __future__ import annotations

from collections.abc import Sequence

from phi3_lora.data.quality.duplicates import Match, NearIndex, conversation_text, exact_key
from phi3_lora.data.rows.conversation import Conversation


def find_leaks(
    train: Sequence[Conversation], valid: Sequence[Conversation], *, near: bool = True
) -> list[Match]:
    """Each validation row that repeats a training row, exactly or nearly.

    Args:
        train: rows trained on.
        valid: rows validated on.
        near: whether to look for near duplicates, too.

    Returns:
        In the order of valid: the row's place in valid, the place in train of the row that is
        most like it, and how much.

    Raises:
        ConfigError: when near is set and datasketch is not installed.
    """
    index = (
        NearIndex([conversation_text(row) for row in (*train, *valid)]) if near and valid else None
    )
    return leaks_in(train, valid, index)


def leaks_in(
    train: Sequence[Conversation], valid: Sequence[Conversation], index: NearIndex | None
) -> list[Match]:
    """As find_leaks, with an index of the training rows followed by the validation rows."""
    first = {exact_key(row): i for i, row in reversed(list(enumerate(train)))}
    exact = {i: first[key] for i, row in enumerate(valid) if (key := exact_key(row)) in first}
    found = [Match(i, other, 1.0, is_exact=True) for i, other in exact.items()]
    for match in index.leaks(len(train)) if index else ():
        row = match.row - len(train)
        if row not in exact:
            found.append(match._replace(row=row))
    return sorted(found)
