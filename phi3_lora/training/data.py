"""The data of a run and the plan of its steps."""

from __future__ import annotations

from typing import NamedTuple

from phi3_lora.config.data import DataConfig
from phi3_lora.config.schema import RunConfig
from phi3_lora.data.documents.dataset import (
    DataFiles,
    load_split,
    load_splits,
    resolve_data,
)
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.overlap import DocumentIndex, overlap_note
from phi3_lora.data.documents.selection import Dataset
from phi3_lora.data.documents.stream import StreamedRows
from phi3_lora.data.sources.in_memory import Data, with_rows
from phi3_lora.data.sources.source import ROWS_IN_MEMORY, Source
from phi3_lora.errors import ConfigError
from phi3_lora.inference.base_model import FoundModel
from phi3_lora.storage.cache import Note
from phi3_lora.training.plan.fixed import Plan
from phi3_lora.training.plan.protocol import StepPlan
from phi3_lora.training.plan.streamed import StreamedPlan


class RunData(NamedTuple):
    """The plan of a run's steps, and its validation data."""

    plan: StepPlan
    valid: Dataset | None
    """None where nothing is validated."""


class PassedRows(NamedTuple):
    """Rows that the caller passes in memory; a configuration cannot hold them."""

    train: Data | None = None
    """A list of rows or a `datasets.Dataset`; None where the configuration names the rows."""
    valid: Data | None = None
    """Rows to validate on; None where the configuration names them, if any."""


NO_PASSED_ROWS = PassedRows()


def read_data(config: RunConfig, base: FoundModel, note: Note, rows: PassedRows) -> RunData:
    """Read the training data (of a stream, the first block) and the validation data.

    Args:
        config: the run.
        base: the base model, whose tokenizer encodes the rows.
        note: receives texts that the user should see.
        rows: rows in memory, used in place of those that the configuration names.

    Raises:
        ConfigError: when settings contradict each other.
        DataError: when the data cannot be used.
        StorageError: when the cache of tokens cannot be written.
    """
    data = config.data
    first: Data = data.source or ""
    if rows.train is not None:
        first = with_rows(data.source or Source(path=ROWS_IN_MEMORY), rows.train)
    valid = data.valid if rows.valid is None else rows.valid
    files = resolve_data(first, valid, more=data.more)
    if files.valid and data.valid_fraction:
        note(f"data.valid_fraction has no effect: {files.valid[0]} is there to validate on")
    return (_streamed if data.streaming else _whole)(config, files, base, note)


def _whole(config: RunConfig, files: DataFiles, base: FoundModel, note: Note) -> RunData:
    data, training = config.data, config.training_config
    if data.buffer_size != DataConfig().buffer_size:
        note("data.buffer_size has no effect without data.streaming")
    train, valid = load_splits(
        files,
        base.tokenizer,
        _encoding(config, base),
        valid_fraction=data.valid_fraction,
        seed=training.seed,
        note=note,
    )
    # Both have the same notes on the chat template.
    for text in dict.fromkeys([*train.notes, *(valid.notes if valid else [])]):
        note(text)
    shared = overlap_note(train.documents, valid.documents) if valid else None
    if shared:
        note(shared)
    plan = Plan(
        train.documents,
        rows_per_step=training.documents_per_step,
        num_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        seed=training.seed,
        row_tokens=training.max_length if training.packing else None,
    )
    return RunData(plan, valid)


def _streamed(config: RunConfig, files: DataFiles, base: FoundModel, note: Note) -> RunData:
    data, training = config.data, config.training_config
    if training.max_steps < 1:
        raise ConfigError(
            "data.streaming needs training_config.max_steps (--max-steps): how many rows there are "
            "is not known before they are read"
        )
    if data.valid_fraction and not files.valid:
        raise ConfigError(
            f"data.valid_fraction {data.valid_fraction} with data.streaming: a share of the rows "
            "cannot be set aside before they are read; name rows to validate on (--valid)"
        )
    encoding = _encoding(config, base)
    valid = None
    if files.valid:
        valid = load_split(files.valid, base.tokenizer, encoding, note=note)
    for text in valid.notes if valid else base.tokenizer.notes:
        note(text)
    held_out = DocumentIndex(valid.documents if valid else ())
    rows = StreamedRows(files.train, base.tokenizer, encoding, data.buffer_size, held_out)
    plan = StreamedPlan(
        rows,
        rows_per_step=training.documents_per_step,
        max_steps=training.max_steps,
        seed=training.seed,
        row_tokens=training.max_length if training.packing else None,
        note=note,
    )
    return RunData(plan, valid)


def _encoding(config: RunConfig, base: FoundModel) -> Encoding:
    return Encoding(
        max_length=config.training_config.max_length,
        context=base.config.max_position_embeddings,
        loss_on=config.data.loss_on,
        too_long=config.data.too_long,
        on_bad_row=config.data.on_bad_row,
    )
