"""llama.cpp's adapter format: one GGUF file of lora_a and lora_b, with one alpha for all.

llama.cpp always multiplies by alpha / rank, so the writer converts an rsLoRA scale to alpha.

Source: llama.cpp, convert_lora_to_gguf.py, src/llama-adapter.cpp; llm_build_inp_embd for the
embedding, whose lora_a is not transposed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter, uniform_adapter, with_scalings
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.record import FileFormat, Written, whole_weights_reason
from phi3_lora.adapters.names import EMBEDDING, HEAD, split_layer
from phi3_lora.arrays import Float32
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models.config import PROJECTIONS, ModelConfig
from phi3_lora.models.gguf_names import gguf_name, module_of_gguf_name
from phi3_lora.storage.atomic import replacing
from phi3_lora.storage.optional import gguf_package

_TENSOR = re.compile(r"^(.+)\.weight\.lora_([ab])$")
_ALPHA = "adapter.lora.alpha"


def why_not_gguf(adapter: Adapter) -> str | None:
    """Return the reason why llama.cpp cannot hold an adapter, or None."""
    if adapter.use_dora:
        return "it uses DoRA"
    if adapter.saved:
        return whole_weights_reason(adapter)
    foreign = [m for m in adapter.modules if _is_foreign(m)]
    return f"{foreign[0]} is no linear layer of Phi-3" if foreign else None


def _is_foreign(module: str) -> bool:
    place = split_layer(module)
    return module not in (EMBEDDING, HEAD) if place is None else place[1] not in PROJECTIONS


def write_gguf_adapter(path: Path, adapter: Adapter) -> None:
    """Write an adapter of fused modules as one file, in float32.

    Raises:
        AdapterError: when llama.cpp cannot hold the adapter, or the package gguf is missing.
        StorageError: when the file cannot be written.
    """
    gguf = gguf_package(AdapterError)
    reason = why_not_gguf(adapter)
    if reason is not None:
        raise AdapterError(f"llama.cpp cannot hold this adapter: {reason}: merge it instead")
    adapter = uniform_adapter(adapter)
    with replacing(path) as part:
        _write(gguf, part, adapter)


def _write(gguf: Any, path: Path, adapter: Adapter) -> None:
    writer = gguf.GGUFWriter(path, "phi3")
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(_ALPHA, adapter.scaling * adapter.r)
        for module in adapter.modules:
            a, b = adapter.pair(module)
            name = f"{gguf_name(module)}.weight"
            a = np.ascontiguousarray(a.T) if module == EMBEDDING else a
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, np.float32))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_gguf_adapter(path: Path) -> Adapter:
    """Read the adapter in a GGUF file; the caller checks its numbers and pairs.

    Raises:
        AdapterError: when the file is damaged, or is not a LoRA adapter of Phi-3.
    """
    reader = _reader(path)
    kind, alpha = _field(reader, "general.type"), _field(reader, _ALPHA)
    if kind != "adapter" or _field(reader, "adapter.type") != "lora":
        raise AdapterError(f"{path} is not a LoRA adapter: its general.type is {kind!r}")
    if not isinstance(alpha, float):
        raise AdapterError(f"{path} has no {_ALPHA}")
    pairs: dict[str, dict[str, Float32]] = {}
    problems = []
    for tensor in reader.tensors:
        match = _TENSOR.match(tensor.name)
        module = None if match is None else module_of_gguf_name(match[1])
        if match is None or module is None or _is_foreign(module):
            problems.append(f"{tensor.name}: not a LoRA tensor of Phi-3")
            continue
        # A float32 tensor stays a view of the mapped file, not a copy.
        value = gguf_package(AdapterError).quants.dequantize(tensor.data, tensor.tensor_type)
        pairs.setdefault(module, {})[match[2]] = np.asarray(value, np.float32)
    for module, pair in pairs.items():
        if set(pair) != {"a", "b"} or any(value.ndim != 2 for value in pair.values()):
            problems.append(f"{module}: needs a matrix lora_a and a matrix lora_b")
    if problems or not pairs:
        raise AdapterError(listing(f"{path} cannot be used:", problems or ["no tensors in it"]))
    found = {
        m: (np.ascontiguousarray(p["a"].T) if m == EMBEDDING else p["a"], p["b"])
        for m, p in pairs.items()
    }
    # llama.cpp reads alpha 0 as scale 1.
    scalings = {m: alpha / len(a) if alpha else 1.0 for m, (a, _) in found.items()}
    return with_scalings(found, scalings)


def _reader(path: Path) -> Any:
    gguf = gguf_package(AdapterError)
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError, OverflowError, TypeError) as cause:
        raise AdapterError(f"{path} is not a complete GGUF file: {cause}") from None


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _read_record(path: Path, missing: MissingMetadata, config: ModelConfig | None) -> Adapter:
    return read_gguf_adapter(path)


def _write_record(path: Path, adapter: Adapter, missing: MissingMetadata) -> Written:
    write_gguf_adapter(path, adapter)
    return Written()


GGUF = FileFormat(
    name="gguf",
    pattern="*.gguf",
    detect=_is_gguf,
    read=_read_record,
    write=_write_record,
    refusal=why_not_gguf,
)
