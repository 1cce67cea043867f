"""LoRA fine-tuning of the Phi-3 family on MLX and PyTorch with the same numbers.

Every function of the product is a name of this package. A name is imported when it is first used,
so `import phi3_lora` is fast. No framework is imported by the core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3_lora.api.adapters import convert, inspect, push
    from phi3_lora.api.data import check_data, preview_data
    from phi3_lora.api.data_files import clean_data, split_data
    from phi3_lora.api.export import merge, quantize
    from phi3_lora.api.inference import evaluate, generate, load
    from phi3_lora.api.machine import doctor
    from phi3_lora.api.models import LoadedModel
    from phi3_lora.api.training import dry_run, resolve_settings, train
    from phi3_lora.api.verification import parity, verify
    from phi3_lora.errors import Phi3LoraError

__all__ = [
    "LoadedModel",
    "Phi3LoraError",
    "check_data",
    "clean_data",
    "convert",
    "doctor",
    "dry_run",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "merge",
    "parity",
    "preview_data",
    "push",
    "quantize",
    "resolve_settings",
    "split_data",
    "train",
    "verify",
]

_NAMES = {
    "api.adapters": ("convert", "inspect", "push"),
    "api.data": ("check_data", "preview_data"),
    "api.data_files": ("clean_data", "split_data"),
    "api.export": ("merge", "quantize"),
    "api.inference": ("evaluate", "generate", "load"),
    "api.machine": ("doctor",),
    "api.models": ("LoadedModel",),
    "api.training": ("dry_run", "resolve_settings", "train"),
    "api.verification": ("parity", "verify"),
    "errors": ("Phi3LoraError",),
}
"""Module -> its public names."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
