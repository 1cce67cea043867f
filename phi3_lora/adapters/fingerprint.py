"""Fingerprint of a trained adapter: its answers to fixed probe texts, stored beside it.

The file holds the log-probability of each next token under the base model and under the adapter.
A replay on another machine or backend shows whether the adapter still gives the same answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi3_lora.arrays import Float32, Int32
from phi3_lora.errors import AdapterError
from phi3_lora.storage.safetensors import encode, read_header, read_metadata, read_raw

FINGERPRINT_NAME = "fingerprint.safetensors"
_ARRAYS = {
    "tokens": np.int32,
    "doc_starts": np.int32,
    "base_logprobs": np.float32,
    "logprobs": np.float32,
    "greedy": np.int32,
}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Answers to the probes; T tokens of D documents laid end to end."""

    tokens: Int32
    """(T,)."""
    doc_starts: Int32
    """(D + 1,) bounds."""
    base_logprobs: Float32
    """(T,) nats, of each next token without the adapter; 0 at a document's last position."""
    logprobs: Float32
    """(T,) nats, of each next token with the adapter."""
    greedy: Int32
    """(T,) ids of the most likely next tokens with the adapter."""
    origin: dict[str, str]
    """backend, dtype and model_identity."""


def encode_fingerprint(fingerprint: Fingerprint) -> bytes:
    """Encode a fingerprint as the content of fingerprint.safetensors."""
    arrays = {name: getattr(fingerprint, name) for name in _ARRAYS}
    return encode(arrays, metadata=fingerprint.origin)


def read_fingerprint(folder: Path) -> Fingerprint:
    """Read the fingerprint in an adapter folder.

    Raises:
        AdapterError: when the file is missing or damaged.
    """
    path = folder / FINGERPRINT_NAME
    if not path.exists():
        raise AdapterError(
            f"{folder} has no {FINGERPRINT_NAME}: only adapters that phi3-lora trained carry "
            "one, and there is nothing to compare with"
        )
    found = read_header(path, AdapterError)
    if set(found) != set(_ARRAYS):
        raise AdapterError(f"{path} is damaged: it must hold {', '.join(_ARRAYS)}")
    arrays = {name: np.array(read_raw(info)) for name, info in found.items()}
    wrong = [name for name, kind in _ARRAYS.items() if arrays[name].dtype != kind]
    length = len(arrays["tokens"])
    wrong += [n for n in _ARRAYS if n != "doc_starts" and arrays[n].shape != (length,)]
    starts = arrays["doc_starts"]
    wrong += ["doc_starts"] if (np.diff(starts) < 1).any() else []
    if wrong or starts.ndim != 1 or len(starts) < 2 or starts[0] != 0 or starts[-1] != length:
        raise AdapterError(f"{path} is damaged: wrong shapes or types")
    return Fingerprint(**arrays, origin=read_metadata(path))


def base_identity(folder: Path) -> str | None:
    """Read the identity of an adapter's base model; None if the folder has no fingerprint.

    Raises:
        AdapterError: when the fingerprint is damaged.
    """
    path = folder / FINGERPRINT_NAME
    if not path.exists():
        return None
    read_header(path, AdapterError)
    return read_metadata(path).get("model_identity")
