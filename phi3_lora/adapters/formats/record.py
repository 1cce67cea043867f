"""Records of adapter formats: the file of a format makes its record, and registry lists it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.models.config import ModelConfig
from phi3_lora.storage.safetensors import NewTensor

Refusal = Callable[[Adapter], str | None]
"""From an adapter to the reason why a format or a tool cannot hold it, or None."""


def hold_any(adapter: Adapter) -> str | None:
    """Refuse no adapter."""
    return None


def whole_weights_reason(adapter: Adapter) -> str:
    """Return the reason why a format without modules_to_save cannot hold whole weights."""
    return f"it holds whole weights ({', '.join(adapter.saved[:3])})"


def _no_notes(adapter: Adapter) -> list[str]:
    return []


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderContent:
    """The part of an adapter folder that belongs to one format."""

    tensors: Mapping[str, NewTensor]
    config: Mapping[str, Any]
    """Keys of adapter_config.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderFormat:
    """A format of an adapter folder: one file of tensors, and keys in adapter_config.json."""

    name: str
    tool: str
    """The tool that defines the format, for messages."""
    weights_name: str
    """File name of the tensors."""
    detect: Callable[[Mapping[str, Any]], bool]
    """Return whether tensor names are in this format; at most one format accepts them."""
    read: Callable[[Path, Mapping[str, Any]], Adapter]
    """Read a weights file with the content of adapter_config.json."""
    encode: Callable[[Adapter, ModelConfig | None], FolderContent]
    """Encode an adapter; the base model's shape is None where it is not known."""
    refusal: Refusal = hold_any
    conversion_notes: Callable[[Adapter], list[str]] = _no_notes
    """Return remarks on an adapter that was converted to this format."""

    @property
    def members(self) -> tuple[FolderFormat, ...]:
        """The format itself."""
        return (self,)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedFolder:
    """A folder with the files of several formats; a format that refuses an adapter is left out."""

    name: str
    members: tuple[FolderFormat, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The outcome of writing an adapter file."""

    notes: list[str] = field(default_factory=list)
    missing: MissingMetadata = field(default_factory=MissingMetadata)
    """Values that the file does not store, for reading it back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFormat:
    """A format of an adapter in a single file."""

    name: str
    pattern: str
    """Glob pattern of the file names that are looked for in a folder."""
    detect: Callable[[Path], bool]
    """Return whether a file's content is in this format; at most one format accepts it."""
    read: Callable[[Path, MissingMetadata, ModelConfig | None], Adapter]
    """Read a file; checks of numbers and pairs are left to the caller."""
    write: Callable[[Path, Adapter, MissingMetadata], Written] | None = None
    """Write a file; None where the format is only read."""
    refusal: Refusal = hold_any
    read_options: frozenset[str] = frozenset()
    """Fields of MissingMetadata that reading uses."""
    write_options: frozenset[str] = frozenset()
    """Fields of MissingMetadata that writing uses."""

    @property
    def members(self) -> tuple[FileFormat, ...]:
        """The format itself."""
        return (self,)


AdapterFormat = FolderFormat | FileFormat
