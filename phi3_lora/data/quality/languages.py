"""Language detection by py3langid, which is small and works offline."""

from __future__ import annotations

from typing import Any

from phi3_lora.errors import ConfigError
from phi3_lora.storage.optional import optional_package

_LEAST_CONFIDENCE = 0.5
"""py3langid scales its confidence by length: short texts, code and formulas stay below."""


class LanguageFilter:
    """Filter that finds texts in any language but the wanted one."""

    def __init__(self, code: str) -> None:
        """Load the model (0.5 s).

        Args:
            code: ISO 639-1 code of the wanted language, such as en.

        Raises:
            ConfigError: when py3langid is not installed or does not know the language.
        """
        library = _py3langid()
        self._identifier = library.LanguageIdentifier.from_model_file(
            library.MODEL_FILE, norm_probs=True
        )
        known = sorted(set(map(str, self._identifier.labels)))
        if code not in known:
            raise ConfigError(
                f"language must be an ISO 639-1 code, got {code!r}; known: {', '.join(known)}"
            )
        self.code = code

    def other_language(self, text: str) -> str | None:
        """Return the language of a text if it is clearly another one; otherwise None."""
        language, confidence = self._identifier.classify(text)
        # zxx means no language, as in tables and code.
        is_other = language not in (self.code, "zxx") and confidence >= _LEAST_CONFIDENCE
        return str(language) if is_other else None


def _py3langid() -> Any:
    return optional_package(
        "py3langid.langid",
        extra="data",
        need="detecting languages needs py3langid",
        error=ConfigError,
        otherwise=", or leave out --language",
    )
