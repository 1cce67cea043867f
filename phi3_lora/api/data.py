"""Data before training, to look at: check and preview."""

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
    """The first rows as training sees them."""

    rows: list[Previewed]
    tokenizer: ChatTokenizer = field(repr=False)
    html: str | None = None
    """The page that was written."""

    @property
    def remarks(self) -> list[str]:
        """Why a row is not kept as it is, or empty, for each row."""
        return [f"{r.training} in training: {r.remark}" if r.remark else "" for r in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return the rows as documents, and the page if one was written."""
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
    """Look for problems in data, with the file and line of each; nothing is changed.

    Args:
        data: as for train.
        valid: rows to validate on, which are checked too, and for leaks.
        near_duplicates: whether to look for rows that are nearly alike; None: if the library for
            it is installed.
        min_chars: least characters of a row.
        max_chars: most characters of a row.
        patterns: regular expressions that no row may match.
        language: the language that rows should be in, such as en.
        note: called with what the user should know; the default logs a warning.
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
        limit: rows to take.
        html: write a page to this file.
        note: called with what the user should know; the default logs a warning.
        settings: config and set as for train; model, which is needed, and revision.

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
