"""A base on a shared grid, made from an unquantised one when it is first asked for."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from phi3_lora.models import ModelConfig
from phi3_lora.quantized_folder import write_quantized_folder
from phi3_lora.storage import explained
from phi3_lora.weights import check_weights, model_identity, tensor_index


def cache_dir() -> Path:
    """Where quantised bases lie: phi3-lora in XDG_CACHE_HOME, or in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "phi3-lora" / "quantized"


def quantized_copy(
    source: Path, config: ModelConfig, *, bits: int, note: Callable[[str], None]
) -> Path:
    """The folder of a model's weights on a grid; processes that ask at once share the work.

    Args:
        source: the model's folder.
        config: of source.
        bits: 4 or 8.
        note: told when the folder is made.

    Raises:
        ModelError: when the weights cannot be used, or are quantised already.
        StorageError: when the cache cannot be written.
    """
    identity = model_identity(source, tensor_index(source, config))
    target = cache_dir() / f"{identity[:32]}-{bits}bit"
    with _locked(target):
        if not target.exists():
            tensors = check_weights(source, config)
            note(f"quantising {source} to {bits} bits, once, into {target}")
            write_quantized_folder(
                source, config, tensors, target, bits=bits, for_transformers=False
            )
    return target


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(target.name + ".lock"), "w")  # noqa: SIM115
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
