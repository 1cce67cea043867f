"""Functions that read data before training: check and preview."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

from phi3_lora.api.data_settings import NO_MODEL, DataSettings, resolve, token_budget
from phi3_lora.api.options import AnyPath, Note, OptionError, folder_of, log_note
from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.quality.checks import Previewed, as_trained, check_rows, first_rows
from phi3_lora.data.quality.cleaning import Cleaning
from phi3_lora.data.quality.duplicates import can_find_near
from phi3_lora.data.quality.report import Report
from phi3_lora.data.sources.in_memory import Data
from phi3_lora.data.sources.reading import check_any, iterate_rows
from phi3_lora.errors import ConfigError
from phi3_lora.report.preview import preview_rows
from phi3_lora.report.preview_page import write_preview


@dataclass(frozen=True, slots=True)
class PreviewResult:
    """The first rows, encoded as for training."""

    rows: list[Previewed]
    tokenizer: ChatTokenizer = field(repr=False)
    html: str | None = None
    """Path of the page; None if none was written."""

    @property
    def remarks(self) -> list[str]:
        """A reason for each row that training changes or drops; empty for a row that is kept."""
        return [f"{r.training} in training: {r.remark}" if r.remark else "" for r in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return the rows as documents, and the path of the page if one was written."""
        documents = [row.to_dict() for row in preview_rows(self.rows)]
        return {"documents": documents, **({} if self.html is None else {"html": self.html})}


def check_data(
    data: Data | None = None,
    *,
    valid: Data | None = None,
    near_duplicates: bool | None = None,
    min_chars: int | None = None,
    max_chars: int | None = None,
    patterns: Sequence[str] = (),
    language: str | None = None,
    note: Note = log_note,
    **settings: Unpack[DataSettings],
) -> Report:
    """Find problems in data, each with its file and line; nothing is changed.

    Args:
        data: as for train.
        valid: rows to validate on; they are checked too, also for leaks into training.
        near_duplicates: whether to look for nearly equal rows; None looks if the library that
            this needs is installed.
        min_chars: fewest characters that a row may have.
        max_chars: most characters that a row may have.
        patterns: regular expressions that no row may match.
        language: the language that rows should be in, such as en.
        note: receives each text for the user; the default logs it as a warning.
        settings: config and set as for train; model and revision for lengths in tokens.

    Raises:
        ConfigError: when a setting cannot be used, or a library is missing.
        DataError: when the data cannot be read at all.
    """
    limits = Cleaning(
        min_chars=min_chars, max_chars=max_chars, patterns=tuple(patterns), language=language
    )
    config, files = resolve(data, valid, settings)
    budget = None if config.model == NO_MODEL else token_budget(config, note)
    near = _look_for_near(near_duplicates, note)
    notes: list[str] = []
    train = list(iterate_rows(files.train, notes))
    check_any(train, files.train)
    held_out = list(iterate_rows(files.valid, notes))
    if files.valid:
        check_any(held_out, files.valid)
    for text in notes:
        note(text)
    return check_rows(train, held_out, budget=budget, near=near, limits=limits)


def preview_data(
    data: Data | None = None,
    *,
    limit: int = 5,
    html: AnyPath | None = None,
    note: Note = log_note,
    **settings: Unpack[DataSettings],
) -> PreviewResult:
    """Return the tokens of the first rows and where the loss counts.

    Args:
        data: as for train.
        limit: number of rows.
        html: write an HTML page to this file.
        note: receives each text for the user; the default logs it as a warning.
        settings: config and set as for train; model, which is required, and revision.

    Raises:
        ConfigError: when a setting cannot be used, or there is no model.
        DataError: when the data cannot be used.
        StorageError: when the page cannot be written.
    """
    config, files = resolve(data, None, settings)
    if config.model == NO_MODEL:
        raise ConfigError("no model: pass --model, or model in --config FILE")
    budget = token_budget(config, note)
    found = PreviewResult(as_trained(first_rows(files.train, limit), budget), budget.tokenizer)
    if html is None:
        return found
    page = folder_of(html)
    if not page.name or page.is_dir():
        raise OptionError(f"--html must name a file, got {str(html)!r}")
    documents = [row.document for row in found.rows]
    title = f"{files.train[0]}, as {config.model} sees it"
    write_preview(page, documents, budget.tokenizer, title, found.remarks)
    return PreviewResult(found.rows, budget.tokenizer, str(page))


def _look_for_near(asked: bool | None, note: Note) -> bool:
    if asked is None and not can_find_near():
        note("near duplicates are not looked for: pip install 'phi3-lora[data]'")
        return False
    return asked is not False
