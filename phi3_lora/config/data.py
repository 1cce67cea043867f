"""The data (`data`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from phi3_lora.config.require import require
from phi3_lora.data.options import LOSS_ON, ON_BAD_ROW, TOO_LONG, LossOn, OnBadRow, TooLong
from phi3_lora.data.sources.source import Source, check_columns, check_format


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data (`data`)."""

    train: str = ""
    """A file, a folder, a pattern, a data set of the hub (owner/name[/subset][:split]), or demo."""
    valid: str | None = None
    """The same, to validate on."""
    valid_fraction: float = 0.0
    """Share of the training rows to validate on, when there is nothing else for it."""
    sources: tuple[Source, ...] = ()
    """More to train on: a list of {path, weight, split, subset, format, columns, streaming}."""
    format: str = "auto"
    """Of the rows of train and valid: messages, sharegpt, prompt-completion, alpaca,
    classification or text; auto takes the first row's."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column -> the one in train and valid."""
    split: str | None = None
    """Which part of a folder or a data set to train on; null is train."""
    subset: str | None = None
    """The configuration of a hub data set that has several."""
    streaming: bool = False
    """Train on rows as they are read, without a pass over them first; needs max_steps."""
    buffer_size: int = 10_000
    """Rows that are read and shuffled at a time when streaming."""
    on_bad_row: OnBadRow = "error"
    """What a row that cannot be used does: error, or skip, which counts and names it."""
    loss_on: LossOn = "assistant"
    """assistant (every answer), last (the last answer) or all; a row's own weights win."""
    too_long: TooLong = "drop"
    """Rows longer than max_length: drop, truncate_left, truncate_right (whole turns) or error."""
    chat_template: str | None = None
    """A Jinja file in place of the model's own chat template."""

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
        """What train names, with the settings that belong to it; None when it names nothing."""
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
        """The entries of sources, streaming where the run does."""
        if not self.streaming:
            return self.sources
        return tuple(dataclasses.replace(source, streaming=True) for source in self.sources)
