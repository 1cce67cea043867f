"""Read files that hold one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3_lora.errors import ModelError, Phi3LoraError


def read_json(path: Path, error: type[Phi3LoraError] = ModelError) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        error: when the file is missing, is not JSON, or holds another value than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} is not readable JSON: {cause}") from None
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
