"""Reader and writer of .pt files of tensors, without torch; a file cannot run code.

Source: torch.serialization: a zip archive with data.pkl, whose tensors are calls of
_rebuild_tensor_v2 on storages, and data/KEY, the storages' bytes.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.arrays import Float32, Tensors
from phi3_lora.errors import AdapterError
from phi3_lora.storage.safetensors import to_float32

_STORAGES: dict[str, tuple[str, Any]] = {
    "FloatStorage": ("F32", np.float32),
    "HalfStorage": ("F16", np.float16),
    "BFloat16Storage": ("BF16", np.uint16),
    "DoubleStorage": ("F64", np.float64),
    # A full state dict may hold buffers of these types.
    "LongStorage": ("I64", np.int64),
    "IntStorage": ("I32", np.int32),
    "ShortStorage": ("I16", np.int16),
    "CharStorage": ("I8", np.int8),
    "ByteStorage": ("U8", np.uint8),
    "BoolStorage": ("BOOL", np.bool_),
}

_MOST_SHARED = 8


class _Storage(NamedTuple):
    dtype: str
    content: NDArray[Any]


def _tensor(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Float32:
    """Rebuild a tensor like _rebuild_tensor_v2, and check that it is inside its storage."""
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("a tensor's size, stride or offset is not a whole number >= 0")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count and (last >= len(storage.content) or count > len(storage.content)):
        raise ValueError(f"a tensor of {size} is larger than its storage")
    if not count:
        return np.zeros(size, np.float32)
    item = storage.content.itemsize
    strides = [step * item for step in stride]
    view = np.lib.stride_tricks.as_strided(storage.content[offset:], size, strides)
    return to_float32(view.copy(), storage.dtype)


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
}


class _Reader(pickle.Unpickler):
    """Unpickler that builds only tensors."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(data))
        self._archive = archive
        self._root = root
        self._times: collections.Counter[str] = collections.Counter()

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise ValueError(f"it asks for {module}.{name}, which is not a tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, count = pid
        # Tied weights share a storage; many more tensors on one would exhaust the memory.
        self._times[key] += 1
        if self._times[key] > _MOST_SHARED:
            raise ValueError(f"storage {key} is used by more than {_MOST_SHARED} tensors")
        dtype, numpy_type = _STORAGES[kind]
        raw = self._archive.read(f"{self._root}/data/{key}")
        content: NDArray[Any] = np.frombuffer(raw, numpy_type)
        if len(content) < count:
            raise ValueError(f"storage {key} is shorter than it says")
        return _Storage(dtype, content)


def read_torch_file(path: Path) -> Tensors:
    """Read the tensors of a state dict, by name, as float32.

    Raises:
        AdapterError: when the file is missing or damaged, or does not hold named tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch never compresses; only a zip bomb would.
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise ValueError("its archive is compressed")
            (root,) = {e.filename.split("/")[0] for e in entries}
            state = _Reader(archive.read(f"{root}/data.pkl"), archive, root).load()
    except FileNotFoundError:
        raise AdapterError(f"no such file: {path}") from None
    # A hostile pickle can raise any exception.
    except Exception as cause:
        raise AdapterError(
            f"{path} is not a state dict of torch.save: {str(cause) or type(cause).__name__}"
        ) from None
    named = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in state.items()
    )
    if not named:
        raise AdapterError(f"{path} holds objects that are not named tensors")
    return dict(state)


def encode_torch_file(tensors: Mapping[str, Float32]) -> bytes:
    """Encode a dict of float32 tensors like torch.save."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        calls = b"".join(
            _text(name) + _call(str(i), value) for i, (name, value) in enumerate(tensors.items())
        )
        archive.writestr("archive/data.pkl", b"\x80\x02}(" + calls + b"u.")
        archive.writestr("archive/byteorder", "little")
        for i, value in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", np.ascontiguousarray(value, "<f4").tobytes())
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _call(key: str, value: Float32) -> bytes:
    """Encode the opcodes of _rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())."""
    stride = [int(np.prod(value.shape[i + 1 :])) for i in range(value.ndim)]
    storage = _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu")
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (b"(" + storage + _int(value.size) + b"tQ")
        + _int(0)
        + (b"(" + b"".join(map(_int, value.shape)) + b"t")
        + (b"(" + b"".join(map(_int, stride)) + b"t")
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)
