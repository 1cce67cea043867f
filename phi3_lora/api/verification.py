"""Functions that compare numbers: verify and parity."""

from __future__ import annotations

from collections.abc import Sequence

from phi3_lora.api.options import AnyPath, Note, log_note
from phi3_lora.config.schema import Device, DtypeOption
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.dataset import build_dataset, resolve_scoring_file
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.sources.in_memory import Data, as_source
from phi3_lora.data.sources.reading import read_conversations
from phi3_lora.engine.registry import available_backends
from phi3_lora.errors import BackendUnavailableError
from phi3_lora.inference.base_model import FoundModel, find_base_model
from phi3_lora.inference.loading import Placement, with_adapter
from phi3_lora.models.config import Quantization
from phi3_lora.verification.fingerprint import Verification, probe_documents, verify_adapter
from phi3_lora.verification.parity import (
    DOCUMENTS_PER_STEP,
    ParityInputs,
    ParityResult,
    run_laws,
)

_MAX_LENGTH = 2048


def verify(
    adapter: AnyPath,
    model: str,
    *,
    revision: str | None = None,
    backend: str = "auto",
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    quantize: Quantization = "none",
    note: Note = log_note,
) -> Verification:
    """Compare an adapter's behaviour here with its behaviour after training.

    Args:
        adapter: a folder or hub id.
        model: the base model: a folder, a hub id, or demo.
        revision: branch, tag or commit of the base model's hub id.
        backend: mlx, cuda or auto.
        device: auto, cpu or gpu.
        dtype: as for load.
        quantize: as for load.
        note: receives each text for the user; the default logs it as a warning.

    Raises:
        AdapterError: when the adapter has no fingerprint, is damaged or does not fit.
        Phi3LoraError: with what else is wrong and what to do.
    """
    return verify_adapter(
        str(adapter),
        lambda: find_base_model(model, revision, quantize=quantize),
        Placement(backend=backend, device=device, dtype=dtype),
        note,
    )


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
    """Measure whether both backends give equal numbers on your own model.

    Args:
        model: a folder, a hub id, or demo.
        adapter: a folder or hub id; the default is an adapter with random weights.
        data: documents to measure with; the default is built-in texts.
        steps: number of training steps.
        device: auto, cpu or gpu.
        quantize: as for load.
        revision: branch, tag or commit of a hub id.
        note: receives each text for the user; the default logs it as a warning.

    Raises:
        BackendUnavailableError: when no backend can run.
        Phi3LoraError: with what else is wrong and what to do.
    """
    base = find_base_model(model, revision, quantize=quantize)
    base, weights = with_adapter(base, None if adapter is None else str(adapter))
    documents = _documents(base, data, steps, note)
    backends, reasons = available_backends(device)
    if not backends:
        raise BackendUnavailableError("no backend can run here:\n  " + "\n  ".join(reasons))
    for reason in reasons:
        note(reason)
    return run_laws(ParityInputs(base, documents, weights, steps), backends, device, note)


def _documents(base: FoundModel, data: Data | None, steps: int, note: Note) -> Sequence[Document]:
    if data is None:
        return probe_documents(base.tokenizer)
    source = as_source(data)
    conversations = read_conversations(resolve_scoring_file(source))
    encoding = Encoding(max_length=_MAX_LENGTH, context=base.config.max_position_embeddings)
    first = conversations[: DOCUMENTS_PER_STEP * steps]
    dataset = build_dataset(first, base.tokenizer, encoding, str(source))
    for text in dataset.notes:
        note(text)
    return dataset.documents
