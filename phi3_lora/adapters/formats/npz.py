"""The .npz format of mlx-examples and of the first mlx-lm: lora_a and lora_b, without a scale.

Source: mlx-examples, lora/lora.py; mlx-lm, tuner/trainer.py before 2024-05.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter, with_scalings
from phi3_lora.adapters.formats.archive import entry_names
from phi3_lora.adapters.formats.config_file import CONFIG_NAME, is_finite, read_adapter_config
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.mlx_lm import from_mlx_tensors, scale_of
from phi3_lora.adapters.formats.record import FileFormat
from phi3_lora.adapters.names import lora_b_name
from phi3_lora.arrays import Tensors
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models.config import ModelConfig

NPZ_NAME = "adapters.npz"
_MAX_BYTES = 8 * 10**9


def _is_npz(path: Path) -> bool:
    names = entry_names(path)
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read(path: Path, missing: MissingMetadata, config: ModelConfig | None) -> Adapter:
    tensors, problems = from_mlx_tensors(_read_arrays(path))
    if problems or not tensors:
        raise AdapterError(listing(f"{path} cannot be used:", problems or ["no tensors in it"]))
    plain = Adapter(weights=tensors, r=1, lora_alpha=1.0)
    modules = plain.modules
    lonely = [m for m in modules if lora_b_name(m) not in tensors]
    if lonely or len(tensors) != 2 * len(modules):
        raise AdapterError(f"{path}: lora_a and lora_b do not come in pairs ({lonely[:3]})")
    pairs = {module: plain.pair(module) for module in modules}
    parameters = _parameters(path)
    if parameters is not None and missing.alpha is not None:
        raise AdapterError(f"{path}: its {CONFIG_NAME} stores the scale: leave out --alpha")
    if parameters is None and missing.alpha is None:
        ranks = sorted({len(a) for a, _ in pairs.values()})
        raise AdapterError(
            f"{path}: an .npz stores no scale; pass --alpha, scale times rank (mlx-examples' own "
            f"scale was 20, which is --alpha {20 * ranks[-1]} at rank {ranks[-1]})"
        )
    scalings = {
        m: (missing.alpha or 0.0) / len(a) if parameters is None else scale_of(parameters, len(a))
        for m, (a, _) in pairs.items()
    }
    return with_scalings(pairs, scalings)


def _parameters(path: Path) -> dict[str, Any] | None:
    """Return lora_parameters of the adapter_config.json beside a file; None without that file."""
    if not (path.parent / CONFIG_NAME).exists():
        return None
    parameters = read_adapter_config(path.parent).get("lora_parameters")
    given = parameters if isinstance(parameters, dict) else {}
    numbers = (given.get("scale"), given.get("alpha", 1.0))
    if not all(map(is_finite, numbers)):
        raise AdapterError(
            f"{path.parent / CONFIG_NAME}: lora_parameters needs a scale that is a number"
        )
    return given


def _read_arrays(path: Path) -> Tensors:
    """Read the arrays of an .npz; numpy rejects arrays that need pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > _MAX_BYTES:
            raise AdapterError(f"{path} unpacks to {size:,} bytes: too large for an adapter")
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        if not all(isinstance(value, np.ndarray) for value in found.values()):
            raise ValueError("it holds objects that are not arrays")
    except (ValueError, OSError, KeyError, zipfile.BadZipFile, EOFError) as cause:
        raise AdapterError(f"{path} is not a complete .npz of numbers: {cause}") from None
    odd = [name for name, value in found.items() if value.dtype.kind != "f"]
    if odd:
        raise AdapterError(
            f"{path} holds arrays that are not of a float type: {', '.join(odd[:5])}"
        )
    return {name: value.astype(np.float32) for name, value in found.items()}


NPZ = FileFormat(
    name="npz",
    pattern=NPZ_NAME,
    detect=_is_npz,
    read=_read,
    read_options=frozenset({"alpha"}),
)
