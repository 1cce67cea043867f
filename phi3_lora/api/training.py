"""Functions for training: train, dry_run and resolve_settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from phi3_lora.api.options import AnyPath, OptionError
from phi3_lora.config.load import RunSettings, load_settings
from phi3_lora.config.schema import Device, DtypeOption, RunConfig
from phi3_lora.data.options import OnBadRow
from phi3_lora.data.sources.in_memory import Data, is_named, recorded_name
from phi3_lora.data.sources.source import Source
from phi3_lora.models.config import Quantization
from phi3_lora.training.data import PassedRows
from phi3_lora.training.facts import RunFacts
from phi3_lora.training.observer import LoggingObserver, Observer
from phi3_lora.training.prepare import prepare
from phi3_lora.training.run import TrainResult
from phi3_lora.training.run import train as run_training
from phi3_lora.training.rundir import read_config

Config = RunConfig | Mapping[str, Any] | AnyPath
"""A whole configuration, a mapping with the keys of a YAML file, or the path of one."""

FLAGS = {
    "model": "model",
    "revision": "revision",
    "adapter": "adapter",
    "backend": "backend",
    "device": "device",
    "dtype": "dtype",
    "quantize": "quantize",
    "output_dir": "output_dir",
    "data": "data.train",
    "valid": "data.valid",
    "valid_fraction": "data.valid_fraction",
    "on_bad_row": "data.on_bad_row",
    "max_steps": "training_config.max_steps",
    "epochs": "training_config.num_train_epochs",
    "batch_size": "training_config.per_device_train_batch_size",
    "grad_accum": "training_config.gradient_accumulation_steps",
    "lr": "training_config.learning_rate",
    "max_length": "training_config.max_length",
    "packing": "training_config.packing",
    "seed": "training_config.seed",
    "rank": "peft_config.r",
    "alpha": "peft_config.lora_alpha",
    "dropout": "peft_config.lora_dropout",
    "targets": "peft_config.target_modules",
}
"""Keyword of train -> place in the configuration; options of the command have these names."""


class TrainSettings(TypedDict, total=False):
    """Keywords of train, which override the configuration."""

    model: str
    """A folder, a hub id, or demo."""
    revision: str | None
    """Branch, tag or commit of a hub id."""
    adapter: AnyPath | None
    """An adapter to start from."""
    backend: str | None
    """mlx, cuda or auto."""
    device: Device | None
    dtype: DtypeOption | None
    quantize: Quantization | None
    output_dir: AnyPath
    """The run folder."""
    data: Data
    """Rows to train on."""
    valid: Data | None
    """Rows to validate on."""
    valid_fraction: float | None
    """Share of the rows of data to validate on."""
    on_bad_row: OnBadRow | None
    max_steps: int | None
    """Optimizer steps."""
    epochs: float | None
    batch_size: int | None
    """Documents in a micro-batch."""
    grad_accum: int | None
    """Micro-batches in a step."""
    lr: float | None
    """Peak learning rate."""
    max_length: int | None
    """Most tokens of a document."""
    packing: bool | None
    seed: int | None
    rank: int | None
    alpha: float | None
    dropout: float | None
    targets: str | Sequence[str] | None
    """Module names, as a list or with commas between them, or one regular expression."""
    preset: str | None
    """demo or sample-finetune."""
    set: Sequence[str]
    """Settings as section.key=value."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Facts about a run that has not started."""

    facts: RunFacts

    def to_dict(self) -> dict[str, Any]:
        """Return the facts by name."""
        return self.facts.to_dict()


def train(
    config: Config | None = None,
    /,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    **settings: Unpack[TrainSettings],
) -> TrainResult:
    """Fine-tune a model and write the run folder.

    Args:
        config: a RunConfig, a mapping with the keys of a YAML file, or the path of one.
        resume: continue from the newest complete checkpoint in the run folder. With output_dir,
            the configuration stored there is the base of all settings.
        observer: receives each event; the default logs notes as warnings.
        settings: the options of the command as keywords; they override config.

    Raises:
        Phi3LoraError: with what is wrong and what to do.
    """
    resolved, observer = _resolve_for(observer, config, resume=resume, **settings)
    return run_training(resolved, resume=resume, observer=observer, rows=_rows(settings))


def dry_run(
    config: Config | None = None,
    /,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    **settings: Unpack[TrainSettings],
) -> TrainingPlan:
    """Check everything but the weights and return the plan of a run; write nothing.

    Args:
        config: as for train.
        resume: as for train.
        observer: as for train.
        settings: as for train.

    Raises:
        Phi3LoraError: with what is wrong and what to do.
    """
    resolved, observer = _resolve_for(observer, config, resume=resume, **settings)
    prepared = prepare(resolved, observer.on_note, with_weights=False, rows=_rows(settings))
    return TrainingPlan(prepared.facts())


def resolve_settings(
    config: Config | None = None,
    /,
    *,
    resume: bool = False,
    **settings: Unpack[TrainSettings],
) -> RunSettings:
    """Merge the settings of a run from all sources, and check every name and value.

    Args:
        config: as for train.
        resume: as for train.
        settings: as for train.

    Raises:
        ConfigError: when settings are unknown or have wrong values; it lists all of them.
    """
    _check_names(settings)
    assignments, flags = settings.get("set", ()), _flags(settings)
    if isinstance(config, RunConfig):
        if settings.get("preset") is not None:
            raise OptionError("preset has no effect on a RunConfig, which holds every setting")
        if not settings:
            return RunSettings(config, [])
        return load_settings(base=config.to_dict(), assignments=assignments, flags=flags)
    run_dir = settings.get("output_dir")
    return load_settings(
        preset=settings.get("preset"),
        config_file=config if config is None or isinstance(config, Mapping) else Path(config),
        base=read_config(Path(run_dir)) if resume and run_dir is not None else None,
        assignments=assignments,
        flags=flags,
    )


def _check_names(settings: Mapping[str, Any]) -> None:
    known = TrainSettings.__annotations__
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise OptionError(f"train has no setting {name!r}; {hint}")


def _resolve_for(
    observer: Observer | None,
    config: Config | None,
    *,
    resume: bool,
    **settings: Unpack[TrainSettings],
) -> tuple[RunConfig, Observer]:
    """Resolve the settings and pass the notes on them to the observer."""
    observer = observer or LoggingObserver()
    resolved = resolve_settings(config, resume=resume, **settings)
    for text in resolved.notes:
        observer.on_note(text)
    return resolved.config, observer


def _flags(settings: TrainSettings) -> dict[str, Any]:
    """Return the keywords by their place in the configuration."""
    given: dict[str, Any] = {name: value for name, value in settings.items() if name in FLAGS}
    for name in ("data", "valid"):
        given.pop(name, None)
    for name in ("adapter", "output_dir"):
        if given.get(name) is not None:
            given[name] = str(given[name])
    if "targets" in given:
        given["targets"] = _target_names(given["targets"])
    return {**{FLAGS[name]: value for name, value in given.items()}, **_data_flags(settings)}


def _data_flags(settings: TrainSettings) -> dict[str, Any]:
    """Return the names of the data to train and validate on, by place in the configuration."""
    data, valid = settings.get("data"), settings.get("valid")
    flags: dict[str, Any] = {
        "data.train": None if data is None else recorded_name(data),
        "data.valid": None if valid is None else recorded_name(valid),
    }
    if isinstance(data, Source) and is_named(data):
        flags["data.sources"] = [data]
        del flags["data.train"]
    return flags


def _rows(settings: TrainSettings) -> PassedRows:
    """Return the rows that the caller passes in memory."""
    data, valid = settings.get("data"), settings.get("valid")
    return PassedRows(
        None if data is None or is_named(data) else data,
        None if valid is None or is_named(valid) else valid,
    )


def _target_names(value: str | Sequence[str] | None) -> str | list[str] | None:
    """Return names as a list, and all-linear or a regular expression unchanged."""
    if value is None or value == "all-linear":
        return value
    if not isinstance(value, str):
        return list(value)
    if set(value) & set("\\^$*+?()[]{}|"):
        return value
    return [name.strip() for name in value.split(",") if name.strip()]
