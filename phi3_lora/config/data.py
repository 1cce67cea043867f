"""Settings of the data (`data`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from phi3_lora.config.require import require
from phi3_lora.data.options import LOSS_ON, ON_BAD_ROW, TOO_LONG, LossOn, OnBadRow, TooLong
from phi3_lora.data.sources.source import Source, check_columns, check_format


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Settings of the data (`data`)."""

    train: str = ""
    """A file, a folder, a pattern, a data set of the hub (owner/name[/subset][:split]), or demo."""
    valid: str | None = None
    """Data to validate on, named as in train."""
    valid_fraction: float = 0.0
    """Share of the training rows to validate on; used only without other validation data."""
    sources: tuple[Source, ...] = ()
    """More to train on: a list of {path, weight, split, subset, format, columns, streaming}."""
    format: str = "auto"
    """Format of the rows of train and valid: messages, sharegpt, prompt-completion, alpaca,
    classification or text; auto recognises it from the first row."""
    columns: dict[str, str] = field(default_factory=dict)
    """Name of a column here -> its name in train and valid."""
    split: str | None = None
    """Split of a folder or a data set to train on; null is train."""
    subset: str | None = None
    """Configuration of a hub data set that has several."""
    streaming: bool = False
    """Read rows while training, without a first pass over them; needs max_steps."""
    buffer_size: int = 10_000
    """Rows that are read and shuffled at a time when streaming."""
    on_bad_row: OnBadRow = "error"
    """Treatment of a row that cannot be used: error, or skip, which counts and names it."""
    loss_on: LossOn = "assistant"
    """Tokens in the loss: assistant (every answer), last (the last answer) or all. Weights in a row
    win over this setting."""
    too_long: TooLong = "drop"
    """Treatment of rows longer than max_length: drop, truncate_left or truncate_right (both cut
    whole turns), or error."""
    chat_template: str | None = None
    """A Jinja file, used in place of the model's chat template."""

    def __post_init__(self) -> None:
        choices = (("loss_on", LOSS_ON), ("too_long", TOO_LONG), ("on_bad_row", ON_BAD_ROW))
        for name, allowed in choices:
            value = getattr(self, name)
            require(
                value in allowed, f"data.{name} must be one of {', '.join(allowed)}; got {value!r}"
            )
        require(
            0.0 <= self.valid_fraction < 1.0,
            f"data.valid_fraction must be in [0, 1), got {self.valid_fraction}",
        )
        check_format(self.format)
        check_columns(self.columns)
        require(self.buffer_size >= 1, f"data.buffer_size must be >= 1, got {self.buffer_size}")
        of_train = ("format", "columns", "split", "subset")
        stray = [name for name in of_train if getattr(self, name) not in ("auto", {}, None)]
        require(
            bool(self.train) or not stray,
            f"data.{', data.'.join(stray)} without data.train: set it in the entries of "
            "data.sources",
        )

    @property
    def source(self) -> Source | None:
        """The data that train names, with its settings; None when train is empty."""
        if not self.train:
            return None
        return Source(
            path=self.train,
            split=self.split,
            subset=self.subset,
            format=self.format,
            columns=self.columns,
            streaming=self.streaming,
        )

    @property
    def more(self) -> tuple[Source, ...]:
        """The entries of sources; each streams if the run streams."""
        if not self.streaming:
            return self.sources
        return tuple(dataclasses.replace(source, streaming=True) for source in self.sources)
