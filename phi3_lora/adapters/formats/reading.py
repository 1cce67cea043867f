"""Reading an adapter of any format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.checks import adapter_problems
from phi3_lora.adapters.formats.detect import detect_file_format, find_adapter_file, find_layouts
from phi3_lora.adapters.formats.folder import read_adapter
from phi3_lora.adapters.formats.fused import RowNorms, fuse
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models.config import ModelConfig


class Source(NamedTuple):
    """An adapter that was read, on fused modules."""

    adapter: Adapter
    layout: str
    """Names of the formats that the adapter was found in, joined by +."""


def read_source(
    path: Path,
    config: ModelConfig | None,
    missing: MissingMetadata,
    row_norms: RowNorms | None = None,
) -> Source:
    """Read an adapter of any format.

    Args:
        path: a folder (PEFT, mlx-lm, unfused, or with one .gguf or adapters.npz), or a file of
            loralib (.pt), llama.cpp (.gguf) or the first mlx-lm (.npz).
        config: configuration of the base model; separate q, k, v may need it.
        missing: values that a .pt or .npz does not store.
        row_norms: norms of the base's weight rows; DoRA of separate q, k, v may need them.

    Raises:
        AdapterError: when the adapter is missing, damaged, or in no known format.
    """
    file = find_adapter_file(path)
    if file is None:
        layouts = "+".join(sorted(find_layouts(path)))
        return Source(read_adapter(path, config, row_norms=row_norms), layouts)
    found = detect_file_format(file)
    if missing.alpha is not None and not 0 < missing.alpha < math.inf:
        raise AdapterError(f"--alpha must be a number > 0, got {missing.alpha}")
    adapter = found.read(file, missing, config)
    problems = adapter_problems(adapter)
    if problems:
        raise AdapterError(listing(f"the adapter in {file} is damaged:", problems))
    return Source(fuse(adapter, config, row_norms), found.name)
