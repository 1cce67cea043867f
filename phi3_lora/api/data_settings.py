"""Settings of data outside a training run: its place, and how training would read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from phi3_lora.api.options import AnyPath, Note
from phi3_lora.config.load import load_settings
from phi3_lora.config.schema import RunConfig
from phi3_lora.data.documents.dataset import DataFiles, resolve_data
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.quality.checks import TokenBudget
from phi3_lora.data.sources.in_memory import Data, is_named, recorded_name, with_rows
from phi3_lora.data.sources.source import Source
from phi3_lora.errors import ConfigError
from phi3_lora.inference.base_model import find_base_model

NO_MODEL = "(no model)"
"""Stands for the model, which a run needs and a function on data may not."""


class DataSettings(TypedDict, total=False):
    """Settings of the data and of its reading, as for train."""

    config: Mapping[str, Any] | AnyPath | None
    """A mapping with the keys of a YAML file, or the path of one."""
    set: Sequence[str]
    """Settings as section.key=value."""
    model: str | None
    """The base model, for its tokens and chat template."""
    revision: str | None
    """Branch, tag or commit of a hub id."""


def resolve(
    data: Data | None, valid: Data | None, settings: DataSettings
) -> tuple[RunConfig, DataFiles]:
    """Return the configuration that train would make from these settings, and its sources.

    Raises:
        ConfigError: when there is no data, or a setting cannot be used.
        DataError: when a source does not exist.
        TypeError: when a setting is unknown.
    """
    unknown = settings.keys() - DataSettings.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}")
    config, assignments = settings.get("config"), settings.get("set", ())
    if data is None and config is None and not assignments:
        raise ConfigError("no data: name DATA, or a --config FILE that names it")
    flags = {
        "data.train": None if data is None else recorded_name(data),
        "data.valid": None if valid is None else recorded_name(valid),
        "model": settings.get("model"),
        "revision": settings.get("revision"),
    }
    resolved = load_settings(
        base={"model": NO_MODEL, "output_dir": "unused"},
        config_file=config if config is None or isinstance(config, Mapping) else Path(config),
        assignments=assignments,
        flags=flags,
    ).config
    chosen = resolved.data
    first: Data = chosen.source or ""
    if isinstance(data, Source):
        first = data
    elif data is not None and not is_named(data):
        first = with_rows(chosen.source or Source(path=recorded_name(data)), data)
    held_out = chosen.valid if valid is None or is_named(valid) else valid
    return resolved, resolve_data(first, held_out, more=chosen.more)


def token_budget(config: RunConfig, note: Note) -> TokenBudget:
    """Return the base model's tokenizer and the settings to encode rows with it, as in training.

    Raises:
        ConfigError: when the chat template cannot be used.
        ModelError: when the model cannot be used.
    """
    data = config.data
    model = find_base_model(
        config.model, config.revision, with_weights=False, chat_template=data.chat_template
    )
    for text in model.tokenizer.notes:
        note(text)
    encoding = Encoding(
        max_length=config.training_config.max_length,
        context=model.config.max_position_embeddings,
        loss_on=data.loss_on,
        too_long=data.too_long,
    )
    return TokenBudget(model.tokenizer, encoding)
