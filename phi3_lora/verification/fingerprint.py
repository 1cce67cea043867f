"""Fingerprints of adapters: scores of fixed probe texts, taken and compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from phi3_lora.adapters.fingerprint import Fingerprint, read_fingerprint
from phi3_lora.arrays import Int32
from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.engine.protocol import Batch, Engine
from phi3_lora.errors import AdapterError
from phi3_lora.hub.download import resolve_adapter_dir
from phi3_lora.inference.base_model import FoundModel
from phi3_lora.inference.loading import Placement, open_engine, with_adapter
from phi3_lora.storage.cache import Note

THRESHOLDS = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""Largest allowed difference of a log-probability in nats; the coarser dtype decides."""

_PROBES = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Add 17 and 25.", "17 + 25 = 42."),
    ("Write one line of Python that reverses a list.", "numbers[::-1]"),
    (
        "A customer in Lisbon ordered three blue lamps for Monday. What should we prepare?",
        "Prepare three blue lamps and send them to Lisbon, so that they arrive by Monday.",
    ),
    ("Translate into German: good morning", "Guten Morgen"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The difference of an adapter's answers here from those on the machine that trained it."""

    max_difference: float
    """Nats, over all next tokens."""
    mean_difference: float
    greedy_agreement: float
    """Share of positions with the same most likely next token."""
    base_max_difference: float
    """Nats, for the base model alone."""
    threshold: float
    """Nats."""
    equal: bool
    same_base: bool
    """True if this base model has the identity of the one that the adapter was trained on."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


def _whole_documents(ids: Sequence[Int32]) -> Batch:
    """Make a batch in which every next token is supervised."""
    return make_batch([Document(i, np.ones(len(i), bool), "probe") for i in ids])


def probe_documents(tokenizer: ChatTokenizer) -> list[Document]:
    """Encode the probe texts with a model's tokenizer; their answers are supervised."""
    rows = [
        Conversation(
            ({"role": "user", "content": question}, {"role": "assistant", "content": answer}),
            f"probe {i}",
        )
        for i, (question, answer) in enumerate(_PROBES, 1)
    ]
    return tokenizer.encode_conversations(rows)


def probe_batch(tokenizer: ChatTokenizer) -> Batch:
    """Make a batch of the probe texts in which every next token is supervised."""
    return _whole_documents([d.tokens for d in probe_documents(tokenizer)])


def take_fingerprint(engine: Engine, batch: Batch, origin: dict[str, str]) -> Fingerprint:
    """Score the probes with and without the adapter."""
    with engine.base_only():
        base = engine.logprobs(batch)
    rows = np.arange(len(batch.tokens), dtype=np.int32)
    greedy = engine.logits(batch, rows).argmax(axis=-1).astype(np.int32)
    return Fingerprint(
        batch.tokens, batch.doc_starts, base, engine.logprobs(batch), greedy, dict(origin)
    )


def check_vocabulary(stored: Fingerprint, vocab_size: int) -> None:
    """Check that the vocabulary of a base model has every token id of the probes.

    Raises:
        AdapterError: when an id is outside the vocabulary; the model is not the adapter's base.
    """
    if stored.tokens.min() < 0 or stored.tokens.max() >= vocab_size:
        raise AdapterError(
            f"the fingerprint holds token id {stored.tokens.max()}, and this base model has "
            f"{vocab_size:,}: the adapter was trained on another one"
        )


def compare(stored: Fingerprint, engine: Engine, identity: str) -> Verdict:
    """Replay a fingerprint on an engine that holds the adapter.

    Args:
        stored: the fingerprint from the adapter's training.
        engine: the engine to replay it on.
        identity: identity of the base model in the engine.
    """
    bounds = itertools.pairwise(stored.doc_starts.tolist())
    batch = _whole_documents([stored.tokens[a:b] for a, b in bounds])
    here = take_fingerprint(engine, batch, {})
    counted = batch.loss_mask
    difference = np.abs(here.logprobs - stored.logprobs)[counted]
    base = np.abs(here.base_logprobs - stored.base_logprobs)[counted]
    dtypes: Sequence[str] = (engine.dtype, stored.origin.get("dtype", "float32"))
    threshold = max(THRESHOLDS.get(dtype, max(THRESHOLDS.values())) for dtype in dtypes)
    largest = float(difference.max(initial=0.0))
    return Verdict(
        max_difference=largest,
        mean_difference=float(difference.mean()),
        greedy_agreement=float((here.greedy == stored.greedy).mean()),
        base_max_difference=float(base.max(initial=0.0)),
        threshold=threshold,
        equal=bool(largest <= threshold),
        same_base=stored.origin.get("model_identity") == identity,
    )


@dataclass(frozen=True, slots=True)
class Verification:
    """The verdict on an adapter, and the place of its training."""

    verdict: Verdict
    origin: dict[str, str]
    """Backend, dtype and model_identity of the training run."""

    @property
    def equal(self) -> bool:
        """True if no log-probability differs by more than the threshold."""
        return self.verdict.equal

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return self.verdict.to_dict()


def verify_adapter(
    adapter: str, find_base: Callable[[], FoundModel], placement: Placement, note: Note
) -> Verification:
    """Replay an adapter's fingerprint and compare the result with its training.

    Args:
        adapter: a folder or a hub id.
        find_base: finds the base model; called after the fingerprint was read.
        placement: the backend, device and dtype to replay it on.
        note: receives each text for the user, before the work starts.

    Raises:
        AdapterError: when there is no fingerprint, or the adapter does not fit the base model.
        ModelError: when the weights cannot be used.
    """
    folder = resolve_adapter_dir(adapter)
    stored = read_fingerprint(folder)
    base = find_base()
    check_vocabulary(stored, base.config.vocab_size)
    base, weights = with_adapter(base, str(folder))
    opened = open_engine(base, weights, placement, note)
    try:
        verdict = compare(stored, opened.engine, opened.base.identity)
    finally:
        opened.engine.close()
    return Verification(verdict, dict(stored.origin))
