"""The values of options on data."""

from __future__ import annotations

LOSS_ON = ("assistant", "last", "all")
"""What the loss counts on: every answer with its end token, the last one, or every token."""


TOO_LONG = ("drop", "truncate_left", "truncate_right", "error")
"""What becomes of a row that is longer than max_length."""


ON_BAD_ROW = ("error", "skip")
"""What becomes of a row that cannot be used."""
