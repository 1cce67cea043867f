"""Settings of the encoding of rows."""

from __future__ import annotations

from typing import Any

import pytest

from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.errors import ConfigError


@pytest.mark.parametrize(
    ("max_length", "context", "limit", "name"),
    [
        (2048, None, 2048, "max_length 2,048"),
        (2048, 4096, 2048, "max_length 2,048"),
        (4096, 4096, 4096, "max_length 4,096"),
        (8192, 4096, 4096, "the model's context of 4,096"),
    ],
)
def test_the_smaller_limit_holds_and_messages_name_it(
    max_length: int, context: int | None, limit: int, name: str
) -> None:
    encoding = Encoding(max_length=max_length, context=context)
    assert (encoding.limit, encoding.limit_name) == (limit, name)


@pytest.mark.parametrize("name", ["loss_on", "too_long", "on_bad_row"])
def test_an_unknown_value_is_refused_with_the_allowed_ones(name: str) -> None:
    values: dict[str, Any] = {name: "never"}
    with pytest.raises(ConfigError, match=rf"{name} must be one of \w+, .*; got 'never'"):
        Encoding(max_length=10, **values)


def test_cached_tokens_are_found_whichever_setting_the_limit_comes_from() -> None:
    shared = {"limit": 10, "loss_on": "assistant", "too_long": "drop", "on_bad_row": "error"}
    assert Encoding(max_length=10).identity() == shared
    assert Encoding(max_length=20, context=10).identity() == shared
