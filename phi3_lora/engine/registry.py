"""Backends by name, found through entry points and imported only when used."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from phi3_lora.engine.protocol import Backend
from phi3_lora.errors import BackendUnavailableError, ConfigError

GROUP = "phi3_lora.backends"


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def backend_names() -> list[str]:
    """Names of the installed backends' entry points, whether or not they can run here."""
    return sorted(_entries())


def load_backend(name: str) -> Backend:
    """Import a backend.

    Raises:
        ConfigError: when no backend has this name.
        BackendUnavailableError: when a package that it needs is missing.
    """
    entries = _entries()
    if name not in entries:
        allowed = ", ".join([*sorted(entries), "auto"])
        raise ConfigError(f"backend must be one of {allowed}; got {name!r} (--backend)")
    try:
        return cast(Backend, entries[name].load()())
    except ModuleNotFoundError as missing:
        raise BackendUnavailableError(
            f"--backend {name} needs the package {missing.name!r}: pip install 'phi3-lora[{name}]'"
        ) from None
    except (ImportError, OSError) as broken:
        raise BackendUnavailableError(
            f"--backend {name}: a package that it needs is installed but cannot be loaded "
            f"({broken}): pip install --force-reinstall 'phi3-lora[{name}]'"
        ) from None


def _auto_order() -> list[str]:
    """MLX first on Apple silicon, PyTorch first elsewhere; the other one if that is missing."""
    on_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    return ["mlx", "cuda"] if on_apple_silicon else ["cuda", "mlx"]


def available_backends(device: str) -> tuple[dict[str, Backend], list[str]]:
    """Every backend that can run on a device, by name, and why the others cannot."""
    found: dict[str, Backend] = {}
    reasons: list[str] = []
    for name, backend in _candidates(device):
        if isinstance(backend, str):
            reasons.append(backend)
        else:
            found[name] = backend
    return found, reasons


def _candidates(device: str) -> Iterator[tuple[str, Backend | str]]:
    """Each backend in the order of auto, or why it cannot run; loaded when it is asked for."""
    for name in _auto_order():
        try:
            backend = load_backend(name)
            backend.check(device)
        except (BackendUnavailableError, ConfigError) as reason:
            yield name, str(reason)
            continue
        yield name, backend


def choose_backend(name: str, device: str) -> tuple[Backend, str, str]:
    """The backend that a name means here, checked, with the device to ask it for.

    Args:
        name: mlx, cuda or auto.
        device: auto, cpu or gpu.

    Returns:
        The backend, the device, and one line that says what `auto` chose ("" for a plain name).

    Raises:
        BackendUnavailableError: when the named backend, or for auto every backend, cannot run.
    """
    if name != "auto":
        backend = load_backend(name)
        # The name cuda asks for a GPU; PyTorch on a CPU must be asked for, or come from auto.
        wanted = "gpu" if (name, device) == ("cuda", "auto") else device
        backend.check(wanted)
        return backend, wanted, ""
    reasons = []
    for candidate, found in _candidates(device):
        if isinstance(found, str):
            reasons.append(found)
            continue
        note = f"--backend auto chose {candidate}"
        if candidate == "cuda" and device != "gpu" and shutil.which("nvidia-smi") is None:
            note += " (PyTorch on the CPU: no NVIDIA GPU here)"
        return found, device, note
    raise BackendUnavailableError("no backend can run here:\n  " + "\n  ".join(reasons))
