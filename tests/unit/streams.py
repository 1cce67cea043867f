"""Rows that are streamed in tests, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.stream import StreamedRows
from phi3_lora.data.options import OnBadRow, TooLong
from phi3_lora.data.sources.source import Source
from phi3_lora.training.plan.position import StreamPosition
from phi3_lora.training.plan.protocol import Step
from phi3_lora.training.plan.streamed import StreamedPlan
from tests.tiny import chat

ROWS: list[Any] = [
    chat("q", "a" * 99) if i % 11 == 5 else chat(f"q{i}", f"a{i}" * (i % 5 + 1)) for i in range(53)
]
"""Rows of many lengths, some of them too long: 48 documents."""


def stream(
    tokenizer: ChatTokenizer,
    *paths: Path | Source,
    buffer_size: int = 10,
    said: list[str] | None = None,
    on_bad_row: OnBadRow = "error",
    too_long: TooLong = "drop",
    **changes: Any,
) -> StreamedPlan:
    sources = [p if isinstance(p, Source) else Source(path=str(p)) for p in paths]
    encoding = Encoding(max_length=60, too_long=too_long, on_bad_row=on_bad_row)
    rows = StreamedRows(sources, tokenizer, encoding, buffer_size)
    settings = {"rows_per_step": 4, "max_steps": 30, "seed": 3, **changes}
    return StreamedPlan(rows, note=([] if said is None else said).append, **settings)


def sources_of(steps: list[Step]) -> list[list[str]]:
    return [[d.source.rpartition(":")[2] for d in step.documents] for step in steps]


def as_stored(position: StreamPosition | None) -> StreamPosition:
    """The position after a round trip through a checkpoint."""
    assert position is not None
    return StreamPosition.from_dict(json.loads(json.dumps(position.to_dict())))
