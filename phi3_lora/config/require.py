"""The check of a setting."""

from __future__ import annotations

from phi3_lora.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise a ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)
