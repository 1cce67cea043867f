"""Cache of quantised base models; each is made at its first use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from phi3_lora.errors import ModelError, StorageError
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.quantization.folder import write_quantized_folder
from phi3_lora.models.quantization.grid import GRID_VERSION
from phi3_lora.models.weights import ModelFiles, check_model_files, check_weights
from phi3_lora.storage.cache import cache_root, found_or_made

_SOURCES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


def cache_dir() -> Path:
    """Return the folder of the quantised base models."""
    return cache_root() / "quantized"


def quantized_copy(
    source: Path, config: ModelConfig, *, bits: int, note: Callable[[str], None]
) -> ModelFiles:
    """Find or make a model folder on a shared grid; parallel processes share the work.

    Args:
        source: the folder of the unquantised model.
        config: the parsed config.json of source.
        bits: 4 or 8.
        note: a function that receives a message when the folder is made.

    Raises:
        ModelError: when the weights cannot be used, or are quantised already.
        StorageError: when the cache cannot be written.
    """
    target = cache_dir() / f"{_key(source)}-{bits}bit"

    def make() -> None:
        tensors = check_weights(source, config)
        note(f"quantising {source} to {bits} bits, once, into {target}")
        write_quantized_folder(source, config, tensors, target, bits=bits, for_transformers=False)

    waiting = "waiting for another process that is quantising the same base"
    try:
        found, _ = found_or_made(target, lambda: _checked(target), make, waiting=waiting, note=note)
    except StorageError as cause:
        raise StorageError(
            f"{cause}, or write the quantised base yourself with phi3-lora quantize --output"
        ) from cause
    return found or check_model_files(target)


def _key(source: Path) -> str:
    """Return a digest of the files' names, sizes and times; an edited model gets a new one."""
    digest = hashlib.sha256(str(GRID_VERSION).encode())
    for path in sorted(p for pattern in _SOURCES for p in source.glob(pattern)):
        status = path.resolve().stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _checked(target: Path) -> ModelFiles | None:
    """Read a cached base model; return None if it is missing or damaged."""
    try:
        return check_model_files(target)
    except ModelError:
        return None
