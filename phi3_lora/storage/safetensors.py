"""Read, check and write safetensors files without a framework, bfloat16 included.

Source: the safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from phi3_lora.arrays import Float32, Tensors
from phi3_lora.errors import Phi3LoraError
from phi3_lora.storage.json_file import read_json

MAX_HEADER_BYTES = 100_000_000
_NUMPY_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "U32": np.uint32,
    "BOOL": np.bool_,
}
FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
ITEM_BYTES = {name: np.dtype(kind).itemsize for name, kind in _NUMPY_TYPES.items()}
STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Name of a dtype -> its name in safetensors."""


class TensorInfo(NamedTuple):
    """Place, dtype and shape of a tensor in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


def read_header(path: Path, error: type[Phi3LoraError]) -> dict[str, TensorInfo]:
    """Read the tensors' places from a file's header, and check them against the file's size.

    Raises:
        error: when the file is missing, truncated, or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise error(
                    f"{path} is not a whole safetensors file ({size:,} bytes): download or copy "
                    "it again"
                )
            header = json.loads(file.read(length))
        return _entries(path, header, start=8 + length, size=size)
    except FileNotFoundError:
        raise error(f"no such file: {path}") from None
    except error:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise error(f"{path} is not a safetensors file: {cause}") from None


def _entries(path: Path, header: object, *, start: int, size: int) -> dict[str, TensorInfo]:
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if any(not isinstance(n, int) or n < 0 for n in (begin, end, *shape)):
            raise ValueError(f"{name}: offsets and shape must be whole numbers >= 0")
        kind = _NUMPY_TYPES.get(entry["dtype"])
        if kind is not None and end - begin != int(np.prod(shape)) * np.dtype(kind).itemsize:
            raise ValueError(f"{name}: {end - begin} bytes do not hold {shape} {entry['dtype']}")
        if begin < 0 or start + end > size:
            raise ValueError(f"truncated: {name} ends after the last byte")
        found[name] = TensorInfo(path, entry["dtype"], shape, start + begin, end - begin)
    used = max((t.offset + t.num_bytes for t in found.values()), default=start)
    if used != size:
        raise ValueError(f"{size - used} bytes belong to no tensor")
    return found


def read_raw(info: TensorInfo) -> NDArray[np.generic]:
    """Map a tensor into memory in its stored dtype; bfloat16 becomes the uint16 of its bits."""
    kind = np.dtype(_NUMPY_TYPES[info.dtype])
    if 0 in info.shape:
        return np.empty(info.shape, kind)
    return np.memmap(info.path, kind, mode="r", offset=info.offset, shape=info.shape)


def read_parts(info: TensorInfo, size: int = 1 << 22) -> Iterator[NDArray[np.generic]]:
    """Read a tensor in its stored dtype, flat, in parts; the file is not mapped into memory.

    Args:
        info: the tensor.
        size: most elements in a part.
    """
    kind = np.dtype(_NUMPY_TYPES[info.dtype])
    total = info.num_bytes // kind.itemsize
    for start in range(0, total, size):
        count = min(size, total - start)
        yield np.fromfile(info.path, kind, count, offset=info.offset + start * kind.itemsize)


def read_float32(info: TensorInfo) -> Float32:
    """Read a tensor in float32; this is exact for float32, float16 and bfloat16."""
    return to_float32(read_raw(info), info.dtype)


def to_float32(raw: NDArray[Any], dtype: str) -> Float32:
    """Convert stored values of a float type to float32."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.array(raw, dtype=np.float32)


def from_float32(value: Float32, dtype: str) -> NDArray[Any]:
    """Round float32 to the nearest number of a float type of safetensors; ties go to even."""
    if dtype != "BF16":
        return value.astype(_NUMPY_TYPES[dtype])
    bits = np.ascontiguousarray(value).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def is_finite(info: TensorInfo) -> bool:
    """True if a stored tensor holds neither NaN nor infinity; integers always pass."""
    if info.dtype not in FLOAT_TYPES:
        return True
    for part in read_parts(info):
        if info.dtype == "BF16":
            # Infinity and NaN have all eight exponent bits set.
            bad = bool((np.bitwise_and(part.view(np.uint16), 0x7F80) == 0x7F80).any())
        else:
            bad = not np.isfinite(part).all()
        if bad:
            return False
    return True


def is_same(first: TensorInfo, second: TensorInfo) -> bool:
    """True if two stored tensors are equal, byte for byte."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return bool(np.array_equal(read_raw(first).view(np.uint8), read_raw(second).view(np.uint8)))


def read_index(path: Path, error: type[Phi3LoraError]) -> dict[str, TensorInfo]:
    """Read the headers of the shards that an index (*.index.json) names.

    Raises:
        error: when the file is not an index, names files outside its folder, or names a damaged
            shard.
    """
    weight_map = read_json(path, error).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise error(f"{path} has no weight_map from tensor names to file names")
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise error(f"{path} names files outside its folder: {', '.join(outside)}")
    found: dict[str, TensorInfo] = {}
    for name in files:
        found.update(read_header(path.parent / name, error))
    return found


def read_all_float32(path: Path, error: type[Phi3LoraError]) -> Tensors:
    """Read all tensors of a file, or of all shards of an index, in float32.

    Raises:
        error: when a file is damaged, or a tensor's dtype is not a float type.
    """
    header = (read_index if path.suffix == ".json" else read_header)(path, error)
    odd = [f"{name} ({i.dtype})" for name, i in header.items() if i.dtype not in FLOAT_TYPES]
    if odd:
        raise error(f"{path} holds tensors that are not of a float type: {', '.join(odd)}")
    return {name: read_float32(info) for name, info in header.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata from a file's header; read_header must have accepted the file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {str(key): str(value) for key, value in (header.get("__metadata__") or {}).items()}


class NewTensor(NamedTuple):
    """A tensor to write; its content is made only when it is written."""

    dtype: str
    """Name of the dtype in safetensors, for example BF16."""
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]
    """A function that makes the content; bfloat16 is the uint16 of its bits."""


def write_streamed(path: Path, tensors: Mapping[str, NewTensor]) -> None:
    """Write a safetensors file, with one tensor in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    raw = json.dumps(header).encode()
    # Readers map the tensors in place, so they must be aligned; the format asks for 8 bytes.
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, tensor in tensors.items():
            value = np.ascontiguousarray(tensor.make())
            wanted = np.dtype(_NUMPY_TYPES[tensor.dtype])
            assert (value.dtype, value.shape) == (wanted, tensor.shape), name
            file.write(value.data)
        file.flush()
        os.fsync(file.fileno())


def encode(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Encode tensors as a safetensors file, with the metadata that PyTorch and MLX tools read."""
    ready = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return bytes(save(ready, metadata={"format": "pt", **(metadata or {})}))
