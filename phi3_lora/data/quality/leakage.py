"""Search for validation rows that repeat training rows; they make the validation loss too low."""

from __future__ import annotations

from collections.abc import Sequence

from phi3_lora.data.quality.duplicates import Match, NearIndex, exact_key
from phi3_lora.data.rows.conversation import Conversation


def find_leaks(
    train: Sequence[Conversation], valid: Sequence[Conversation], index: NearIndex | None
) -> list[Match]:
    """Find each validation row that repeats a training row, exactly or nearly.

    Args:
        train: rows to train on.
        valid: rows to validate on.
        index: index of the training rows followed by the validation rows; None finds exact
            repetitions only.

    Returns:
        Matches in the order of valid: `row` is an index in valid, `other` is the index in train
        of the most similar row.
    """
    first = {exact_key(row): i for i, row in reversed(list(enumerate(train)))}
    exact = {i: first[key] for i, row in enumerate(valid) if (key := exact_key(row)) in first}
    found = [Match(i, other, 1.0, is_exact=True) for i, other in exact.items()]
    for match in index.leaks(len(train)) if index else ():
        row = match.row - len(train)
        if row not in exact:
            found.append(match._replace(row=row))
    return sorted(found)
