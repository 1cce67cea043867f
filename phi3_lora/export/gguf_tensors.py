"""Tensors of a GGUF file: their storage types, rounding and writing, a block of rows at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.arrays import Float32
from phi3_lora.errors import ModelError
from phi3_lora.storage.optional import gguf_package
from phi3_lora.storage.safetensors import NewTensor, from_float32, to_float32

_BLOCK_ELEMENTS = 1 << 22
Q8_0_VALUES = 32
"""Number of weights in a row that share a scale."""
_Q8_0_BYTES = 34
_LARGEST_Q8_0 = 127 * float(np.finfo(np.float16).max)


class OutType(NamedTuple):
    """A storage type of matrices in a GGUF file; vectors are always float32."""

    stored_as: str
    """The float type of the tensors before they are written, as safetensors names it."""
    ggml: str
    file_type: str
    """llama.cpp's name of the file type."""


OUT_TYPES = {
    "f32": OutType("F32", "F32", "ALL_F32"),
    "f16": OutType("F16", "F16", "MOSTLY_F16"),
    "bf16": OutType("BF16", "BF16", "MOSTLY_BF16"),
    "q8_0": OutType("F32", "Q8_0", "MOSTLY_Q8_0"),
}
OUT_TYPE_OF = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""A dtype of a model -> the output type that holds it."""


class PlannedTensor(NamedTuple):
    """A tensor to write, with its GGUF name and storage type."""

    name: str
    kind: str
    """F32, F16, BF16 or Q8_0."""
    tensor: NewTensor

    @property
    def num_bytes(self) -> int:
        """Size in the file, without padding."""
        count = math.prod(self.tensor.shape)
        if self.kind == "Q8_0":
            return count // Q8_0_VALUES * _Q8_0_BYTES
        return count * (4 if self.kind == "F32" else 2)


def storage_type(shape: tuple[int, ...], ggml: str) -> str:
    """Return the storage type of a tensor in a file whose matrices are of type ggml."""
    if len(shape) == 1:
        return "F32"
    # llama.cpp's converter does the same with rows of other lengths.
    return "F16" if ggml == "Q8_0" and shape[-1] % Q8_0_VALUES else ggml


def as_q8_0(value: Float32) -> Float32:
    """Round rows of a matrix to the values that a reader of a q8_0 file gets.

    A second rounding changes nothing.

    Raises:
        ModelError: when a number is too large.
    """
    kind = storage_type(value.shape, "Q8_0")
    if kind != "Q8_0":
        return to_float32(_stored(value, kind, "a matrix"), kind)
    gguf = gguf_package(ModelError)
    packed = _quantized(value, "a matrix")
    return np.asarray(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0), np.float32)


def write_tensors(part: Path, plan: list[PlannedTensor], alignment: int) -> None:
    """Append the tensors to a header; the package itself would hold each tensor in memory."""
    with open(part, "ab") as file:
        file.write(bytes(-file.tell() % alignment))
        for planned in plan:
            _write_tensor(file, planned)
            file.write(bytes(-planned.num_bytes % alignment))
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, planned: PlannedTensor) -> None:
    # A separate function frees all views of a tensor before the next tensor is made.
    for block in _blocks(planned):
        file.write(np.ascontiguousarray(block).data)


def _blocks(planned: PlannedTensor) -> Iterator[NDArray[Any]]:
    """Encode a tensor for the file, a block of rows at a time."""
    name, kind, tensor = planned
    value = tensor.make()
    assert value.shape == tensor.shape, name
    rows = max(1, _BLOCK_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
    for start in range(0, len(value), rows):
        part = value[start : start + rows]
        yield part if kind == tensor.dtype else _stored(to_float32(part, tensor.dtype), kind, name)


def _stored(value: Float32, kind: str, name: str) -> NDArray[Any]:
    if kind == "Q8_0":
        return _quantized(value, name)
    with np.errstate(over="ignore"):
        stored = from_float32(value, kind)
    if not np.isfinite(to_float32(stored, kind)).all():
        raise _too_large(name, kind)
    return stored


def _quantized(value: Float32, name: str) -> NDArray[Any]:
    gguf = gguf_package(ModelError)
    if not np.abs(value).max(initial=0.0) <= _LARGEST_Q8_0:
        raise _too_large(name, "Q8_0")
    # 1 / scale is infinite for a scale near 0, which is then stored as 0.
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quantize(value, gguf.GGMLQuantizationType.Q8_0))


def _too_large(name: str, kind: str) -> ModelError:
    return ModelError(f"{name} has a number that {kind} does not hold: use --outtype bf16 or f32")
