"""Import of optional packages, which only some tasks need."""

from __future__ import annotations

import importlib
from typing import Any

from phi3_lora.errors import Phi3LoraError


def optional_package(
    name: str, *, extra: str, need: str, error: type[Phi3LoraError], otherwise: str = ""
) -> Any:
    """Import a package that one of our extras installs.

    Args:
        name: the name to import.
        extra: our extra that installs the package.
        need: the start of the error message: the task that needs the package.
        error: the type of the error.
        otherwise: the end of the error message: a way without the package, if there is one.

    Raises:
        error: when the package is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise error(f"{need}: pip install 'phi3-lora[{extra}]'{otherwise}") from None


def gguf_package(error: type[Phi3LoraError]) -> Any:
    """Import the package gguf of the llama.cpp project.

    Raises:
        error: when the package is not installed.
    """
    return optional_package("gguf", extra="gguf", need="a GGUF file needs gguf", error=error)
