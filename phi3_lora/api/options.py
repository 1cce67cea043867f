"""Options that several functions share, and the kinds of values they take."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from phi3_lora.data.sources.source import Source
from phi3_lora.errors import ConfigError
from phi3_lora.training.observer import LoggingObserver

Note = Callable[[str], None]
"""Called with what the user should know."""
AnyPath = str | os.PathLike[str]
Data = AnyPath | Source | Sequence[Mapping[str, Any]]
"""A file, a folder, a pattern, a data set of the hub (owner/name), or demo."""
Device = Literal["auto", "cpu", "gpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "4bit", "8bit", "nf4", "mlx-affine"]
OnBadRow = Literal["error", "skip"]
LossOn = Literal["assistant", "last", "all"]
Part = Literal["q", "k", "v", "gate", "up"]
PARTS = ("q", "k", "v", "gate", "up")
"""Parts of a fused projection that loralib's MergedLinear may adapt."""


class OptionError(ConfigError):
    """Options that cannot be used together, or a value that an option does not take."""


class ModelOptions(TypedDict, total=False):
    """Options for loading a model; the defaults are those of `load`."""

    adapter: AnyPath | None
    """An adapter's folder or hub id."""
    revision: str | None
    """Branch, tag or commit of a hub id."""
    backend: str
    """mlx, cuda or auto."""
    device: Device
    dtype: Dtype
    """Dtype of the base model."""
    quantize: Quantization
    """Quantisation of the base model."""
    note: Note


class SamplingOptions(TypedDict, total=False):
    """Options for choosing tokens."""

    max_new_tokens: int
    """Default: 256."""
    temperature: float
    """Default: 0, which always takes the most likely token."""
    seed: int
    """Seed of the draws. Default: 0."""


def log_note(text: str) -> None:
    """Log a note as a warning of the logger phi3_lora."""
    LoggingObserver().note(text)


def as_source(data: Data) -> str | Source:
    """Return what the readers take for a value that was given as data.

    Raises:
        OptionError: when it is not one of the kinds of data.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (str, os.PathLike)):
        return os.fspath(data)
    raise OptionError(f"data must be a path, a hub id or demo; got {type(data).__name__}")


def setting_of(data: Data | None) -> str | None:
    """Return the text by which a configuration names data.

    Raises:
        OptionError: when it is not one of the kinds of data.
    """
    if data is None:
        return None
    source = as_source(data)
    return source.path if isinstance(source, Source) else source


def given_source(data: Data | None, named: str | Source | None) -> str | Source | None:
    """Return the source to read: data itself where a configuration cannot hold it.

    Args:
        data: as the caller gave it.
        named: the source that the configuration names.
    """
    return data if isinstance(data, Source) else named


def part_names(enable: str | Sequence[str] | None) -> list[str]:
    """Return the names of parts in a list, or in a text with commas.

    Raises:
        OptionError: when a name is unknown.
    """
    given = enable.split(",") if isinstance(enable, str) else enable or ()
    names = [name.strip() for name in given if name.strip()]
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise OptionError(f"--enable {unknown[0]!r}: allowed are {', '.join(PARTS)}")
    return names


def folder_of(output: AnyPath) -> Path:
    """Return the path of an output, with ~ replaced by the home folder."""
    return Path(output).expanduser()
