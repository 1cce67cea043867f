"""Options that several functions share, and the types of their values."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypedDict, get_args

from phi3_lora.config.schema import Device, DtypeOption
from phi3_lora.errors import ConfigError
from phi3_lora.models.config import Quantization
from phi3_lora.training.observer import LoggingObserver

Note = Callable[[str], None]
"""A function that receives a text for the user."""
AnyPath = str | os.PathLike[str]
Part = Literal["q", "k", "v", "gate", "up"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Parts of a fused projection that loralib's MergedLinear may adapt."""


class OptionError(ConfigError):
    """Options do not go together, or an option does not take this value."""


class ModelOptions(TypedDict, total=False):
    """Options for loading a model; the defaults are those of `load`."""

    adapter: AnyPath | None
    """An adapter's folder or hub id."""
    revision: str | None
    """Branch, tag or commit of a hub id."""
    backend: str
    """mlx, cuda or auto."""
    device: Device
    dtype: DtypeOption
    """Dtype of the base model."""
    quantize: Quantization
    """Quantisation of the base model."""
    note: Note


class SamplingOptions(TypedDict, total=False):
    """Options for choosing tokens."""

    max_new_tokens: int
    """Default: 256."""
    temperature: float
    """Default: 0, which always chooses the most likely token."""
    seed: int
    """Seed of the draws. Default: 0."""


def log_note(text: str) -> None:
    """Log a note as a warning of the logger phi3_lora."""
    LoggingObserver().on_note(text)


def part_names(enable: str | Sequence[str] | None) -> list[str]:
    """Return the names of parts from a list, or from a text with commas.

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
