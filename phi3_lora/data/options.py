"""Options on data that have a closed set of values."""

from __future__ import annotations

from typing import Literal, get_args

LossOn = Literal["assistant", "last", "all"]
"""The tokens in the loss: every answer with its end token, the last answer, or every token."""
TooLong = Literal["drop", "truncate_left", "truncate_right", "error"]
"""The treatment of a row that is longer than the token limit."""
OnBadRow = Literal["error", "skip"]
"""The treatment of a row that cannot be used."""
Outcome = Literal["kept", "shortened", "dropped", "error"]
"""The result of training's treatment of a row; error stops training."""

LOSS_ON: tuple[LossOn, ...] = get_args(LossOn)
TOO_LONG: tuple[TooLong, ...] = get_args(TooLong)
ON_BAD_ROW: tuple[OnBadRow, ...] = get_args(OnBadRow)
