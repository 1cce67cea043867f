"""Registry of the backends: found through entry points, imported only when used."""

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
    """Return the names of the installed backends, also of those that cannot run here."""
    return sorted(_entries())


def load_backend(name: str) -> Backend:
    """Import a backend by name.

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
    """Return the order in which `auto` tries backends: MLX first on Apple silicon only."""
    on_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    return ["mlx", "cuda"] if on_apple_silicon else ["cuda", "mlx"]


def available_backends(device: str) -> tuple[dict[str, Backend], list[str]]:
    """Return the backends that can run on a device, by name, and the reasons why others cannot."""
    found: dict[str, Backend] = {}
    reasons: list[str] = []
    for name, backend in _candidates(device):
        if isinstance(backend, str):
            reasons.append(backend)
        else:
            found[name] = backend
    return found, reasons


def _candidates(device: str) -> Iterator[tuple[str, Backend | str]]:
    """Yield each backend's name, and the backend or the reason why it cannot run.

    A backend is imported only when the caller takes its item.
    """
    for name in _auto_order():
        try:
            backend = load_backend(name)
            backend.check(device)
        except (BackendUnavailableError, ConfigError) as reason:
            yield name, str(reason)
            continue
        yield name, backend


def choose_backend(name: str, device: str) -> tuple[Backend, str, str]:
    """Choose a backend and check that it can run.

    Args:
        name: mlx, cuda or auto.
        device: auto, cpu or gpu.

    Returns:
        The backend, the device for LoadRequest, and a note that names the choice of `auto`
        (empty for any other name).

    Raises:
        BackendUnavailableError: when the named backend, or for auto every backend, cannot run.
    """
    if name != "auto":
        backend = load_backend(name)
        # The name cuda means a GPU. PyTorch runs on a CPU only with --device cpu or by auto.
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
