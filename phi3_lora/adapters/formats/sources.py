"""An adapter of any layout, told by what is in its files and never by a label."""

from __future__ import annotations

import dataclasses
import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter, adapter_problems, with_scalings
from phi3_lora.adapters.formats.folder import (
    CONFIG_NAME,
    find_layouts,
    read_adapter,
    read_adapter_config,
)
from phi3_lora.adapters.formats.fused import RowNorms, fuse
from phi3_lora.adapters.formats.gguf import read_gguf_adapter
from phi3_lora.adapters.formats.loralib import Untold, from_loralib
from phi3_lora.adapters.formats.mlx_lm import from_mlx_tensors, scale_of
from phi3_lora.adapters.formats.peft import is_finite
from phi3_lora.adapters.formats.torch_pickle import read_torch_file
from phi3_lora.adapters.names import lora_b_name
from phi3_lora.arrays import Tensors
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models.config import ModelConfig

NPZ_NAME = "adapters.npz"
_MOST_BYTES = 8 * 10**9


def read_source(
    path: Path, config: ModelConfig | None, untold: Untold, row_norms: RowNorms | None = None
) -> tuple[Adapter, str]:
    """An adapter on fused modules, and the names of its layouts joined by +.

    Args:
        path: a folder (PEFT, mlx-lm, unfused, or with one .gguf or adapters.npz), or a file of
            loralib (.pt), llama.cpp (.gguf) or the first mlx-lm (.npz).
        config: the base model's shape, which separate q, k, v may need.
        untold: what a .pt or .npz does not say.
        row_norms: of the base's weights, which DoRA of separate q, k, v may need.

    Raises:
        AdapterError: when it is missing, damaged, or none of these.
    """
    file = other_layout(path)
    if file is None:
        layouts = "+".join(sorted(find_layouts(path)))
        return read_adapter(path, config, row_norms=row_norms), layouts
    layout = _file_layout(file)
    if untold.alpha is not None and not 0 < untold.alpha < math.inf:
        raise AdapterError(f"--alpha must be a number > 0, got {untold.alpha}")
    if layout == "gguf":
        adapter = read_gguf_adapter(file)
    elif layout == "npz":
        adapter = _read_npz(file, untold)
    else:
        adapter = from_loralib(read_torch_file(file), untold, str(file), config)
    problems = adapter_problems(adapter)
    if problems:
        raise AdapterError(listing(f"the adapter in {file} is damaged:", problems))
    return fuse(adapter, config, row_norms), layout


def other_layout(path: Path) -> Path | None:
    """The file of a layout that is one file: path, or the only one in a folder of nothing else."""
    if path.is_file():
        return path
    folder = path
    if not folder.is_dir() or any(folder.glob("*.safetensors*")):
        return None
    found = [*folder.glob("*.gguf"), *folder.glob(NPZ_NAME), *folder.glob("*.pt")]
    if len(found) > 1:
        names = ", ".join(sorted(p.name for p in found))
        raise AdapterError(f"{folder} holds several adapters: name one of {names}")
    return found[0] if found else None


def _file_layout(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return "gguf"
    if start == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError) as cause:
            raise AdapterError(f"{path} is no whole archive: {cause}") from None
        if names and all(name.endswith(".npy") for name in names):
            return "npz"
    # torch_file says what is wrong with anything else.
    return "loralib"


def _read_npz(path: Path, untold: Untold) -> Adapter:
    """The layout of mlx-examples and the first mlx-lm: its lora_a and lora_b, and no scale.

    Source: mlx-examples, lora/lora.py; mlx-lm, tuner/trainer.py before 2024-05.
    """
    tensors, problems = from_mlx_tensors(_read_arrays(path))
    if problems or not tensors:
        raise AdapterError(listing(f"{path} cannot be used:", problems or ["no tensors in it"]))
    modules = Adapter(weights=tensors, r=1, lora_alpha=1.0).modules
    lonely = [m for m in modules if lora_b_name(m) not in tensors]
    if lonely or len(tensors) != 2 * len(modules):
        raise AdapterError(f"{path}: lora_a and lora_b do not come in pairs ({lonely[:3]})")
    plain = Adapter(weights=tensors, r=1, lora_alpha=1.0)
    pairs = {module: plain.pair(module) for module in modules}
    parameters = _npz_parameters(path)
    if parameters is not None and untold.alpha is not None:
        raise AdapterError(f"{path}: its {CONFIG_NAME} tells the scale: leave out --alpha")
    if parameters is None and untold.alpha is None:
        ranks = sorted({len(a) for a, _ in pairs.values()})
        raise AdapterError(
            f"{path}: an .npz stores no scale; pass --alpha, scale times rank (mlx-examples' own "
            f"scale was 20, which is --alpha {20 * ranks[-1]} at rank {ranks[-1]})"
        )
    scalings = {
        m: (untold.alpha or 0.0) / len(a) if parameters is None else scale_of(parameters, len(a))
        for m, (a, _) in pairs.items()
    }
    return with_scalings(pairs, scalings)


def _npz_parameters(path: Path) -> dict[str, Any] | None:
    """lora_parameters of an adapter_config.json beside the file, if there is one."""
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
    """The arrays of an .npz; what would need pickle is refused by numpy."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > _MOST_BYTES:
            raise AdapterError(f"{path} unpacks to {size:,} bytes: that is no adapter")
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        if not all(isinstance(value, np.ndarray) for value in found.values()):
            raise ValueError("it holds something else than arrays")
    except (ValueError, OSError, KeyError, zipfile.BadZipFile, EOFError) as cause:
        raise AdapterError(f"{path} is no whole .npz of numbers: {cause}") from None
    odd = [name for name, value in found.items() if value.dtype.kind != "f"]
    if odd:
        raise AdapterError(
            f"{path} holds arrays that are not of a float type: {', '.join(odd[:5])}"
        )
    return {name: value.astype(np.float32) for name, value in found.items()}


def with_layers(adapter: Adapter, config: ModelConfig | None) -> Adapter:
    """The adapter, told how many layers its base has, where that is known."""
    if config is None:
        return adapter
    return dataclasses.replace(adapter, num_layers=config.num_hidden_layers)
