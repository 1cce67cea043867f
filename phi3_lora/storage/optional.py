"""Packages that only some tasks need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from phi3_lora.errors import Phi3LoraError


def optional_package(
    name: str, *, extra: str, need: str, error: type[Phi3LoraError], otherwise: str = ""
) -> Any:
    """Import a package of one of our extras.

    Args:
        name: as it is imported.
        extra: of ours that brings it.
        need: the start of the message: the task that needs the package.
        error: to raise.
        otherwise: the end of the message, where there is a way without the package.

    Raises:
        error: when it is not installed, with the line that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise error(f"{need}: pip install 'phi3-lora[{extra}]'{otherwise}") from None


def gguf_package(error: type[Phi3LoraError]) -> Any:
    """Import gguf, the package of llama.cpp's authors.

    Raises:
        error: when it is not installed.
    """
    return optional_package("gguf", extra="gguf", need="a GGUF file needs gguf", error=error)
