"""Functions that write new data files before training: split and clean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from phi3_lora.api.data_settings import NO_MODEL, DataSettings, resolve, token_budget
from phi3_lora.api.options import AnyPath, Note, OptionError, folder_of, log_note
from phi3_lora.data.documents.dataset import DataFiles
from phi3_lora.data.quality import splitting
from phi3_lora.data.quality.cleaned_files import read_for_cleaning, write_cleaned
from phi3_lora.data.quality.cleaning import Cleaning, clean
from phi3_lora.data.quality.splitting import TRAIN_NAME, VALID_NAME, Split
from phi3_lora.data.sources.in_memory import Data


class CleaningSteps(DataSettings, total=False):
    """Steps of cleaning; only the steps that are set are taken."""

    unicode: bool
    """Convert text to Unicode NFC and remove control characters."""
    white_space: bool
    """Normalise spaces and line ends, and remove them at the ends of turns."""
    empty: bool
    """Drop rows with an empty user turn."""
    duplicates: bool
    """Keep the first of equal rows."""
    near_duplicates: bool
    """Keep the first of nearly equal rows."""
    min_chars: int | None
    max_chars: int | None
    min_tokens: int | None
    max_tokens: int | None
    patterns: Sequence[str]
    """Drop rows that one of these regular expressions matches."""
    language: str | None
    """Drop rows that are clearly not in this language (ISO 639-1, such as en)."""


@dataclass(frozen=True, slots=True)
class SplitResult:
    """A training file and a validation file that were written."""

    folder: Path
    split: Split

    @property
    def num_valid_rows(self) -> int:
        """Number of rows to validate on."""
        return len(self.split.valid)

    def to_dict(self) -> dict[str, Any]:
        """Return paths and counts by name."""
        split = self.split
        return {
            "train": str(self.folder / TRAIN_NAME),
            "valid": str(self.folder / VALID_NAME),
            "num_train_rows": split.num_rows - self.num_valid_rows,
            "num_valid_rows": self.num_valid_rows,
            "valid_fraction": self.num_valid_rows / split.num_rows,
            "num_groups": split.num_groups,
            "largest_group": split.largest_group,
            "labels": {k: {"train": a, "valid": b} for k, (a, b) in split.labels.items()},
        }


@dataclass(frozen=True, slots=True)
class CleanResult:
    """Files of cleaned rows that were written."""

    path: str
    files: list[str]
    rows: int
    """Number of rows before cleaning."""
    kept: int
    steps: dict[str, dict[str, int]]
    """Step -> number of rows that it changed and dropped."""

    def to_dict(self) -> dict[str, Any]:
        """Return paths and counts by name."""
        return {
            "path": self.path,
            "files": self.files,
            "rows": self.rows,
            "kept": self.kept,
            "steps": self.steps,
        }


def split_data(
    data: Data | None = None,
    *,
    output: AnyPath,
    valid_fraction: float = 0.1,
    group_by: str | None = None,
    stratify_by: str | None = None,
    near_duplicates: bool = True,
    seed: int = 0,
    note: Note = log_note,
    **settings: Unpack[DataSettings],
) -> SplitResult:
    """Write train.jsonl and valid.jsonl, with no row on both sides.

    Args:
        data: as for train.
        output: a new folder.
        valid_fraction: share of the rows to validate on.
        group_by: a key of the rows; rows with the same value stay together.
        stratify_by: a key of the rows; each value gets the same share.
        near_duplicates: whether nearly equal rows stay together.
        seed: seed of the draw.
        note: receives each text for the user; the default logs it as a warning.
        settings: config and set as for train.

    Raises:
        ConfigError: when a setting cannot be used, or a library is missing.
        DataError: when the data cannot be used or split, or output is in use.
    """
    folder = folder_of(output)
    splitting.check_unused(folder)
    config, files = resolve(data, None, settings)
    _note_left_out(files, note)
    notes: list[str] = []
    rows = splitting.read_split_rows(
        files.train,
        keys=[key for key in (group_by, stratify_by) if key],
        near=near_duplicates,
        on_bad_row=config.data.on_bad_row,
        notes=notes,
    )
    for text in notes:
        note(text)
    found = splitting.split_rows(
        rows,
        fraction=valid_fraction,
        seed=seed,
        group_by=group_by,
        stratify_by=stratify_by,
        near=near_duplicates,
    )
    splitting.write_split(rows, found, folder)
    _note_settings_needed(files, note)
    result = SplitResult(folder, found)
    _note_other_share(result, valid_fraction, note)
    return result


def _note_other_share(result: SplitResult, wanted: float, note: Note) -> None:
    """Report the share of validation rows where it is not the share that was asked for."""
    split = result.split
    if abs(result.num_valid_rows - wanted * split.num_rows) > 1:
        share = result.num_valid_rows / split.num_rows
        note(
            f"{share:.1%} of the rows are set aside, not {wanted:.1%}: rows that belong "
            f"together stay together (the largest set has {split.largest_group:,})"
        )


def clean_data(
    data: Data | None = None,
    *,
    output: AnyPath,
    note: Note = log_note,
    **options: Unpack[CleaningSteps],
) -> CleanResult:
    """Clean the rows to train on, and write them and every change.

    Args:
        data: as for train.
        output: a new folder.
        note: receives each text for the user; the default logs it as a warning.
        options: the steps, at least one; config and set as for train; model and revision for
            lengths in tokens.

    Raises:
        OptionError: when no step is set, or a limit in tokens is set without a model.
        ConfigError: when a setting cannot be used, or a library is missing.
        DataError: when the data cannot be used, or output is in use.
    """
    settings, chosen = _split_options(options)
    if chosen == Cleaning():
        raise OptionError("no step is chosen: name at least one, for example --white-space")
    folder = folder_of(output)
    splitting.check_unused(folder)
    config, files = resolve(data, None, settings)
    has_model = config.model != NO_MODEL
    if (chosen.min_tokens, chosen.max_tokens) != (None, None) and not has_model:
        raise OptionError("--min-tokens and --max-tokens need --model, whose tokens they count")
    _note_left_out(files, note)
    notes: list[str] = []
    rows, others = read_for_cleaning(files.train, on_bad_row=config.data.on_bad_row, notes=notes)
    for text in notes:
        note(text)
    found = clean(rows, chosen, token_budget(config, note).tokenizer if has_model else None)
    names = write_cleaned(folder, found, others)
    if not found.rows:
        note("no row is left: training needs at least one")
    return CleanResult(str(folder), names, len(rows), len(found.rows), found.counts())


def _split_options(options: CleaningSteps) -> tuple[DataSettings, Cleaning]:
    """Split keywords into the settings of the data and the steps."""
    given: dict[str, Any] = dict(options)
    settings: DataSettings = {}
    for name in DataSettings.__annotations__.keys() & given.keys():
        settings[name] = given.pop(name)  # type: ignore[literal-required]
    given["patterns"] = tuple(given.get("patterns", ()))
    return settings, Cleaning(**given)


def _note_left_out(files: DataFiles, note: Note) -> None:
    """Report validation rows and source weights, which the written file does not hold."""
    if files.valid:
        names = ", ".join(map(str, files.valid))
        note(f"only the rows to train on are taken: the validation rows in {names} are left out")
    weighed = [f"{source} {source.weight:g}" for source in files.train if source.weight != 1]
    if weighed:
        note(
            f"each row is taken once: weights of sources ({', '.join(weighed)}) are for training; "
            "to keep them write each source on its own"
        )


def _note_settings_needed(files: DataFiles, note: Note) -> None:
    """Report the settings that unchanged rows need again when they are read."""
    first = files.train[0]
    needed = [] if first.format == "auto" else [f"data.format={first.format}"]
    if first.columns:
        columns = ", ".join(f"{ours}: {theirs}" for ours, theirs in first.columns.items())
        needed.append(f"data.columns={{{columns}}}")
    if needed:
        note(f"rows are written as they are: to read them set {' and '.join(needed)} again")
