"""All adapter formats. A new format is one file beside this one and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from phi3_lora.adapters.formats.gguf import GGUF
from phi3_lora.adapters.formats.loralib import LORALIB
from phi3_lora.adapters.formats.mlx_lm import MLX_LM
from phi3_lora.adapters.formats.npz import NPZ
from phi3_lora.adapters.formats.peft import PEFT
from phi3_lora.adapters.formats.record import AdapterFormat, FileFormat, FolderFormat, SharedFolder
from phi3_lora.adapters.formats.unfused import UNFUSED

_TABLE: tuple[AdapterFormat | SharedFolder, ...] = (
    PEFT,
    MLX_LM,
    SharedFolder(name="both", members=(PEFT, MLX_LM)),
    UNFUSED,
    LORALIB,
    GGUF,
    NPZ,
)
FOLDER_FORMATS: Mapping[str, FolderFormat] = {
    entry.name: entry for entry in _TABLE if isinstance(entry, FolderFormat)
}
FILE_FORMATS: Mapping[str, FileFormat] = {
    entry.name: entry for entry in _TABLE if isinstance(entry, FileFormat)
}
TARGETS: Mapping[str, AdapterFormat | SharedFolder] = {
    entry.name: entry
    for entry in _TABLE
    if not isinstance(entry, FileFormat) or entry.write is not None
}
"""Formats to convert to, by the values of --to and in the order that users see."""
