"""A converted adapter against its source by what models answer with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.detect import find_layouts
from phi3_lora.arrays import Float32
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.protocol import Backend
from phi3_lora.inference.base_model import BaseModel
from phi3_lora.inference.loading import open_engine
from phi3_lora.models.family import peer_differences
from phi3_lora.verification.fingerprint import probe_documents

_GATE = 1e-4
"""Largest difference of logits, over their standard deviation."""
_DOCUMENTS = 2
Note = Callable[[str], None]


class Answers(NamedTuple):
    """How far one reader's answers with the result are from ours with the source."""

    reader: str
    max_difference: float
    """Of logits, over their standard deviation."""
    gate: float | None
    """None where the reader's base model is another one: then nothing is judged."""

    @property
    def is_equal(self) -> bool:
        """Whether the answers are the same, as far as they can be judged."""
        return self.gate is None or bool(self.max_difference <= self.gate)

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return {**self._asdict(), "equal": self.is_equal}


def compare_answers(
    base: BaseModel,
    adapters: tuple[Adapter, Adapter],
    target: Path,
    backends: Mapping[str, Backend],
    note: Note,
) -> list[Answers]:
    """Logits of probe texts with the source and the result, here and in the stock tools.

    Args:
        base: with its weights.
        adapters: the source of the conversion, and its result as read back.
        target: where the result lies.
        backends: that can run here, at least one; each compares, and is asked for its stock tool.
        note: told of readers that are left out.
    """
    source, result = adapters
    documents = probe_documents(base.tokenizer)[:_DOCUMENTS]
    found = []
    before: Float32 | None = None
    for name in backends:
        answers = [_ours(base, name, a, documents, note) for a in (source, result)]
        before = answers[0] if before is None else before
        std = float(before.std())
        found += [Answers(f"phi3-lora, {name}", _gap(a, before) / std, _GATE) for a in answers[1:]]
    assert before is not None
    layouts = set(find_layouts(target)) if target.is_dir() else set()
    for name, backend in backends.items():
        if backend.stock_layout not in layouts:
            note(f"{backend.stock_tool} does not read this layout: its answers were not compared")
            continue
        logits = np.concatenate(
            [backend.stock_logits(base.path, target, d.tokens) for d in documents]
        )
        other = peer_differences(base.config).get(backend.stock_tool)
        if other is not None:
            note(f"{backend.stock_tool} {other}: its difference says nothing of the adapter")
        gate = _GATE if other is None else None
        found.append(
            Answers(f"{backend.stock_tool} (stock, {name})", _gap(logits, before) / std, gate)
        )
    return found


def _ours(
    base: BaseModel, backend: str, adapter: Adapter, documents: list[Document], note: Note
) -> Float32:
    opened = open_engine(
        base,
        backend=backend,
        device="cpu",
        dtype="float32",
        adapter=dataclasses.replace(adapter, base_identity=None),
        note=note,
    )
    try:
        batch = make_batch(documents)
        return opened.engine.logits(batch, np.arange(len(batch.tokens), dtype=np.int32))
    finally:
        opened.engine.close()


def _gap(first: Float32, second: Float32) -> float:
    return float(np.abs(first - second).max())
