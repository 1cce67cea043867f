"""adapter_config.json, and checks of its values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from phi3_lora.errors import AdapterError
from phi3_lora.storage.json_file import read_json

CONFIG_NAME = "adapter_config.json"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        AdapterError: when it is missing or is not a JSON object.
    """
    return read_json(folder / CONFIG_NAME, AdapterError)


def is_number(value: Any, *kinds: type) -> bool:
    """Return whether a value read from JSON is of these kinds; true and false are not numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Return whether a value read from JSON is a number that a float holds."""
    try:
        return is_number(value, int, float) and math.isfinite(value)
    except OverflowError:
        return False
