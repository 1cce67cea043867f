"""The formats of files and folders, found by their content and never by a label."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_lora.adapters.fingerprint import FINGERPRINT_NAME
from phi3_lora.adapters.formats.loralib import LORALIB
from phi3_lora.adapters.formats.mlx_lm import MLX_LM
from phi3_lora.adapters.formats.peft import PEFT
from phi3_lora.adapters.formats.record import FileFormat
from phi3_lora.adapters.formats.registry import FILE_FORMATS, FOLDER_FORMATS
from phi3_lora.errors import AdapterError
from phi3_lora.storage.safetensors import read_header, read_index

_NUMBERED = re.compile(r"\d{7}_adapters\.safetensors")
"""Names of mlx-lm's checkpoints."""


def find_layouts(folder: Path) -> dict[str, Path]:
    """Return the weights file of each format that a folder holds, by the format's name.

    Raises:
        AdapterError: when the folder does not exist, or holds no adapter weights.
    """
    if not folder.is_dir():
        raise AdapterError(f"no such adapter folder: {folder}")
    found: dict[str, Path] = {}
    index = folder / f"{PEFT.weights_name}.index.json"
    shards: set[str] = set()
    if index.exists():
        tensors = read_index(index, AdapterError)
        shards = {info.path.name for info in tensors.values()}
        found[_format_of(tensors) or PEFT.name] = index
    candidates: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == FINGERPRINT_NAME or path.name in shards:
            continue
        name = _format_of(read_header(path, AdapterError))
        if name is not None:
            candidates.setdefault(name, []).append(path)
    for name, paths in candidates.items():
        found.setdefault(name, _newest(folder, FOLDER_FORMATS[name].weights_name, paths))
    if not found:
        raise AdapterError(
            f"{folder} holds no adapter: expected {PEFT.weights_name} (PEFT) or "
            f"{MLX_LM.weights_name} (mlx-lm) with LoRA tensors"
        )
    return found


def _newest(folder: Path, usual: str, paths: list[Path]) -> Path:
    """Return the file of the usual name, else the last of mlx-lm's numbered checkpoints.

    Raises:
        AdapterError: when there are other files of the same format.
    """
    others = [p for p in paths if p.name != usual and not _NUMBERED.fullmatch(p.name)]
    final = [p for p in paths if p.name == usual]
    if len(others) + len(final) > 1:
        names = ", ".join(p.name for p in (*final, *others))
        raise AdapterError(
            f"{folder} holds several adapters ({names}): leave the one that you mean"
        )
    return (final or others or paths)[-1]


def _format_of(tensor_names: Mapping[str, Any]) -> str | None:
    formats = (f.name for f in FOLDER_FORMATS.values() if f.detect(tensor_names))
    return next(formats, None)


def find_adapter_file(path: Path) -> Path | None:
    """Return a path that is a file, or the only adapter file in a folder without safetensors.

    Raises:
        AdapterError: when a folder holds several adapter files.
    """
    if path.is_file():
        return path
    folder = path
    if not folder.is_dir() or any(folder.glob("*.safetensors*")):
        return None
    found = [file for f in FILE_FORMATS.values() for file in folder.glob(f.pattern)]
    if len(found) > 1:
        names = ", ".join(sorted(p.name for p in found))
        raise AdapterError(f"{folder} holds several adapters: name one of {names}")
    return found[0] if found else None


def detect_file_format(path: Path) -> FileFormat:
    """Return the format of an adapter file.

    Raises:
        AdapterError: when the file is a damaged archive.
    """
    # The reader of loralib's files reports the fault of a file in no format.
    return next((f for f in FILE_FORMATS.values() if f.detect(path)), LORALIB)
