"""Checks of numbers: an adapter here and where it was trained, and both backends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from phi3_lora.adapters.fingerprint import read_fingerprint
from phi3_lora.api.options import (
    AnyPath,
    Data,
    Device,
    Dtype,
    Note,
    Quantization,
    as_source,
    log_note,
)
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.dataset import build_dataset, resolve_scoring_file
from phi3_lora.data.sources.reading import read_conversations
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.engine.protocol import Backend
from phi3_lora.engine.registry import available_backends
from phi3_lora.errors import BackendUnavailableError
from phi3_lora.hub.download import resolve_adapter_dir
from phi3_lora.inference.base_model import BaseModel, look_at_model
from phi3_lora.inference.loading import load_adapter, open_engine, prepare_weights
from phi3_lora.verification.fingerprint import Verdict, check_vocabulary, compare, probe_documents
from phi3_lora.verification.parity import (
    DOCUMENTS_PER_STEP,
    Law,
    Numbers,
    Trial,
    cross_laws,
    measure,
    own_laws,
    random_start,
)

_MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """An adapter's fingerprint replayed here."""

    verdict: Verdict
    trained_on: dict[str, str]
    """Backend and dtype where the adapter was trained, by name."""

    @property
    def equal(self) -> bool:
        """True if no log-probability differs by more than the threshold."""
        return self.verdict.equal

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return self.verdict.to_dict()


@dataclass(frozen=True, slots=True)
class ParityResult:
    """The laws of parity, measured on this machine."""

    laws: list[Law]
    backends: list[str]

    @property
    def holds(self) -> bool:
        """True if every law holds."""
        return all(law.holds for law in self.laws)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        laws = [law.to_dict() for law in self.laws]
        return {"laws": laws, "backends": self.backends, "holds": self.holds}


def verify(
    adapter: AnyPath,
    model: str,
    *,
    revision: str | None = None,
    backend: str = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantization = "none",
    note: Note = log_note,
) -> VerifyResult:
    """Compare an adapter's behaviour here with its behaviour where it was trained.

    Args:
        adapter: a folder or hub id.
        model: the base model: a folder, a hub id, or demo.
        revision: branch, tag or commit of the base model's hub id.
        backend: mlx, cuda or auto.
        device: auto, cpu or gpu.
        dtype: as for load.
        quantize: as for load.
        note: called with what the user should know; the default logs a warning.

    Raises:
        AdapterError: when the adapter has no fingerprint, is damaged or does not fit.
        Phi3LoraError: with what else is wrong and what to do.
    """
    folder = resolve_adapter_dir(str(adapter))
    stored = read_fingerprint(folder)
    base = look_at_model(model, revision, quantize=quantize)
    check_vocabulary(stored, base.config.vocab_size)
    weights = load_adapter(str(folder), base)
    opened = open_engine(
        base, backend=backend, device=device, dtype=dtype, adapter=weights, note=note
    )
    try:
        verdict = compare(stored, opened.engine, opened.identity)
    finally:
        opened.engine.close()
    return VerifyResult(verdict, dict(stored.origin))


def parity(
    model: str,
    *,
    adapter: AnyPath | None = None,
    data: Data | None = None,
    steps: int = 10,
    device: Device = "auto",
    quantize: Quantization = "none",
    revision: str | None = None,
    note: Note = log_note,
) -> ParityResult:
    """Measure on a model of your own that both backends give the same numbers.

    Args:
        model: a folder, a hub id, or demo.
        adapter: a folder or hub id; the default is one of random weights.
        data: documents to use; the default is built-in texts.
        steps: training steps.
        device: auto, cpu or gpu.
        quantize: as for load.
        revision: branch, tag or commit of a hub id.
        note: called with what the user should know; the default logs a warning.

    Raises:
        BackendUnavailableError: when no backend can run.
        Phi3LoraError: with what else is wrong and what to do.
    """
    base = look_at_model(model, revision, quantize=quantize)
    weights = None if adapter is None else load_adapter(str(adapter), base)
    shapes = base.config.linear_shapes()
    spec = LoraSpec.uniform(shapes, r=8, scaling=2.0) if weights is None else weights.spec
    start = random_start(spec, shapes) if weights is None else weights.weights
    trial = Trial(base, _documents(base, data, steps, note), spec, start, steps)
    backends, reasons = available_backends(device)
    if not backends:
        raise BackendUnavailableError("no backend can run here:\n  " + "\n  ".join(reasons))
    for reason in reasons:
        note(reason)
    return ParityResult(_laws(trial, backends, device, note), list(backends))


def _laws(trial: Trial, backends: dict[str, Backend], device: Device, note: Note) -> list[Law]:
    laws: list[Law] = []
    measured: list[Numbers] = []
    # All weights are checked before the first backend computes.
    ready = {name: prepare_weights(trial.base, b, note)[0] for name, b in backends.items()}
    for name, backend in backends.items():
        own = dataclasses.replace(trial, base=ready[name])
        other = measured[0].trained if measured else None
        measured.append(measure(own, backend, device, other))
        laws += own_laws(name, measured[-1])
    if len(measured) == 2:
        return [*cross_laws(*measured), *laws]
    note("one backend only: the laws between backends were not run; verify needs just one")
    return laws


def _documents(base: BaseModel, data: Data | None, steps: int, note: Note) -> list[Document] | Any:
    if data is None:
        return probe_documents(base.tokenizer)
    source = as_source(data)
    conversations = read_conversations(resolve_scoring_file(source))
    dataset = build_dataset(
        conversations[: DOCUMENTS_PER_STEP * steps],
        base.tokenizer,
        max_length=_MAX_LENGTH,
        name=str(source),
        context=base.config.max_position_embeddings,
    )
    for text in dataset.notes:
        note(text)
    return dataset.documents
