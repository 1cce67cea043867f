"""Comparison of a converted adapter with its source: deltas, and a model's answers with each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.convert import SAME, Conversion
from phi3_lora.adapters.formats.detect import find_layouts
from phi3_lora.arrays import Float32
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.protocol import Backend, Engine
from phi3_lora.engine.registry import available_backends
from phi3_lora.inference.base_model import FoundModel
from phi3_lora.inference.loading import Placement, open_engine
from phi3_lora.models.family import peer_differences
from phi3_lora.storage.cache import Note
from phi3_lora.verification.fingerprint import probe_documents

_GATE = 1e-4
"""Largest allowed difference of logits, divided by their standard deviation."""
_DOCUMENTS = 2


class Answers(NamedTuple):
    """Distance between a reader's logits with the result and our logits with the source."""

    reader: str
    max_difference: float
    """Largest difference of the logits, divided by their standard deviation."""
    gate: float | None
    """Largest allowed difference; None if the reader computes the base model differently."""

    @property
    def is_equal(self) -> bool:
        """True if the difference is within the gate, or there is no gate."""
        return self.gate is None or bool(self.max_difference <= self.gate)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {**self._asdict(), "equal": self.is_equal}


@dataclass(frozen=True, slots=True)
class ConversionCheck:
    """Distance between the result of a conversion and its source."""

    max_relative_difference: float
    """Largest difference of a module's delta, divided by the delta's norm."""
    worst_module: str | None
    answers: tuple[Answers, ...] | None
    """None if no model was asked."""

    @property
    def is_equal(self) -> bool:
        """True if deltas and answers differ by rounding errors only."""
        same_deltas = self.max_relative_difference <= SAME
        return bool(same_deltas) and all(answer.is_equal for answer in self.answers or ())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name, as --json prints them."""
        found: dict[str, Any] = {
            "max_relative_difference": self.max_relative_difference,
            "worst_module": self.worst_module,
            "equal": self.is_equal,
        }
        if self.answers is not None:
            found["answers"] = [answer.to_dict() for answer in self.answers]
        return found


def verify_conversion(
    result: Conversion, target: Path, base: FoundModel | None, note: Note
) -> ConversionCheck:
    """Compare a converted adapter with its source by deltas and by a model's answers.

    Args:
        result: the finished conversion.
        target: the file or folder of the result.
        base: the base model with its weights; None compares the deltas only.
        note: receives the reason why a backend or a stock tool was not run.
    """
    answers = None
    if base is not None:
        backends, reasons = available_backends("cpu")
        for reason in reasons:
            note(reason)
        if backends:
            answers = tuple(compare_answers(base, result.adapters, target, backends, note))
        else:
            note("no backend can run here: the model's answers were not compared")
    return ConversionCheck(result.max_relative_difference, result.worst_module, answers)


def compare_answers(
    base: FoundModel,
    adapters: tuple[Adapter, Adapter],
    target: Path,
    backends: Mapping[str, Backend],
    note: Note,
) -> list[Answers]:
    """Compare logits of probe texts with the source and the result, here and in the stock tools.

    Args:
        base: the base model with its weights.
        adapters: the source of the conversion, and the result after it was read back.
        target: the file or folder of the result.
        backends: at least one backend that can run here; each also names a stock tool.
        note: receives the readers that are left out.
    """
    documents = probe_documents(base.tokenizer)[:_DOCUMENTS]
    found = []
    before: Float32 | None = None
    for name in backends:
        own, converted = _our_logits(base, name, adapters, documents, note)
        before = own if before is None else before
        std = float(before.std())
        found.append(Answers(f"phi3-lora, {name}", _gap(converted, before) / std, _GATE))
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
            note(f"{backend.stock_tool} {other}: its difference says nothing about the adapter")
        gate = _GATE if other is None else None
        found.append(
            Answers(f"{backend.stock_tool} (stock, {name})", _gap(logits, before) / std, gate)
        )
    return found


def _our_logits(
    base: FoundModel,
    backend: str,
    adapters: tuple[Adapter, Adapter],
    documents: Sequence[Document],
    note: Note,
) -> tuple[Float32, Float32]:
    """Compute a backend's logits with each of two adapters.

    The model is loaded once if both adapters have the same spec.
    """
    first, second = adapters
    batch = make_batch(documents)
    rows = np.arange(len(batch.tokens), dtype=np.int32)
    engine = _open(base, backend, first, note)
    try:
        before = engine.logits(batch, rows)
        if second.spec == first.spec:
            engine.write_adapter(second.weights)
            return before, engine.logits(batch, rows)
    finally:
        engine.close()
    engine = _open(base, backend, second, note)
    try:
        return before, engine.logits(batch, rows)
    finally:
        engine.close()


def _open(base: FoundModel, backend: str, adapter: Adapter, note: Note) -> Engine:
    # Source and result are compared on one base, which need not be the base of the training.
    compared = dataclasses.replace(adapter, base_identity=None)
    placement = Placement(backend=backend, device="cpu", dtype="float32")
    return open_engine(base, compared, placement, note).engine


def _gap(first: Float32, second: Float32) -> float:
    return float(np.abs(first - second).max())
