"""Quantisation of a base model to 4 or 8 bits, written as a new folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi3_lora.errors import ModelError
from phi3_lora.hub.download import resolve_model_dir
from phi3_lora.models.quantization.folder import write_quantized_folder
from phi3_lora.models.weights import check_model_files
from phi3_lora.storage.atomic import check_folder_unused


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """A quantised copy of a base model."""

    path: str
    bits: int
    error: float
    """|change| / |weight| over all quantised layers, in the Frobenius norm."""
    worst_error: float
    """The largest error of a layer."""
    worst_module: str

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


def quantize(
    model: str, target: Path, *, bits: int = 4, revision: str | None = None
) -> QuantizeResult:
    """Write a base model in 4 or 8 bits, with equal weights on both backends.

    Args:
        model: a folder, a hub id, or demo.
        target: a folder that does not exist or is empty.
        bits: 4 or 8.
        revision: branch, tag or commit of a hub id.

    Raises:
        ModelError: when target is in use, or the model cannot be used or is quantised already.
        StorageError: when the disk is full; target is left unchanged.
    """
    check_folder_unused(target, ModelError, "already holds something: choose another --output")
    source = check_model_files(resolve_model_dir(model, revision))
    error = write_quantized_folder(source.path, source.config, source.tensors, target, bits=bits)
    return QuantizeResult(str(target), bits, error.mean, error.worst, error.worst_module)
