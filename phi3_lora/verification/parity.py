"""The laws of parity on a user's own model, data and adapter, on the backends of this machine.

One backend is open at a time: each leaves its numbers behind, and the numbers are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from phi3_lora.adapters.initialization import initial_weights
from phi3_lora.adapters.names import is_b
from phi3_lora.arrays import Float32, Tensors
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.engine.protocol import Backend, Engine
from phi3_lora.engine.random_streams import uniform
from phi3_lora.engine.request import LoadRequest
from phi3_lora.inference.base_model import CheckedModel

DOCUMENTS_PER_STEP = 4
_LEARNING_RATE = 1e-4
_LOGIT_ROWS = 64
"""Positions whose logits are compared; all of them would fill the memory."""


@dataclass(frozen=True, slots=True)
class Law:
    """One law, measured."""

    law: str
    what: str
    value: float
    gate: float

    @property
    def holds(self) -> bool:
        """Whether the value is within the gate; NaN is not."""
        return bool(self.value <= self.gate)

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return {**asdict(self), "holds": self.holds}


@dataclass(frozen=True, slots=True)
class Numbers:
    """What one backend gave; logits are (rows, vocabulary)."""

    base_logits: Float32
    start: Tensors
    """The adapter as read back before any step."""
    gradients: Tensors
    """Of the first step's documents together."""
    gradients_alone: Tensors
    """The same, summed over documents one at a time in reverse order."""
    losses: list[float]
    """Nats per supervised token, of each step."""
    trained: Tensors
    trained_logits: Float32
    other_logits: Float32 | None
    """With the adapter that the other backend trained."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What is run on each backend."""

    base: CheckedModel
    documents: Sequence[Document]
    spec: LoraSpec
    start: Tensors
    num_steps: int

    def steps(self) -> list[list[Document]]:
        """The documents of each step, anew from the first when they run out."""
        endless = itertools.cycle(self.documents)
        return [list(itertools.islice(endless, DOCUMENTS_PER_STEP)) for _ in range(self.num_steps)]


def random_start(spec: LoraSpec, shapes: dict[str, tuple[int, int]]) -> Tensors:
    """An adapter whose B is not 0: at 0 the gradient of A would be exactly 0."""
    weights = initial_weights(spec, shapes, seed=0)
    return {
        name: uniform(0, f"parity {name}", value.shape, 0.01) if is_b(name) else value
        for name, value in weights.items()
    }


def measure(
    trial: Trial,
    backend: Backend,
    device: str,
    other: Tensors | None = None,
    dtype: str = "float32",
) -> Numbers:
    """Everything that the laws compare, from one backend.

    Args:
        trial: what to run.
        backend: on what.
        device: auto, cpu or gpu.
        other: an adapter that another backend trained.
        dtype: of the base model; the gates are float32's.
    """
    request = LoadRequest(
        model=trial.base.files,
        dtype=dtype,
        device=device,
        quantize=trial.base.found.backend_quantization,
        lora=trial.spec,
    )
    engine = backend.open(request)
    try:
        engine.write_adapter(trial.start)
        return _measure(engine, trial.steps(), other)
    finally:
        engine.close()


def _measure(engine: Engine, steps: list[list[Document]], other: Tensors | None) -> Numbers:
    probe = make_batch(steps[0])
    rows = np.unique(np.linspace(0, len(probe.tokens) - 1, _LOGIT_ROWS).astype(np.int32))
    with engine.base_only():
        base_logits = engine.logits(probe, rows)
    start = engine.read_adapter()
    count = sum(d.loss_tokens for d in steps[0])
    whole = engine.gradients(probe, loss_tokens=count)
    alone: Tensors = {name: np.zeros_like(value) for name, value in whole.items()}
    for document in reversed(steps[0]):
        for name, value in engine.gradients(make_batch([document]), loss_tokens=count).items():
            alone[name] += value
    losses = []
    for number, chosen in enumerate(steps, 1):
        loss_tokens = sum(d.loss_tokens for d in chosen)
        result = engine.train_step(
            make_batch(chosen), loss_tokens=loss_tokens, lr=_LEARNING_RATE, step=number
        )
        losses.append(float(result.loss))
    trained, trained_logits = engine.read_adapter(), engine.logits(probe, rows)
    other_logits = None
    if other is not None:
        engine.write_adapter(other)
        other_logits = engine.logits(probe, rows)
    return Numbers(base_logits, start, whole, alone, losses, trained, trained_logits, other_logits)


def own_laws(name: str, numbers: Numbers) -> list[Law]:
    """The law that one backend shows alone."""
    value = _largest_relative(numbers.gradients_alone, numbers.gradients)
    return [Law("L7", f"{name}: gradients, documents together or alone, relative", value, 1e-5)]


def cross_laws(first: Numbers, second: Numbers) -> list[Law]:
    """The laws between two backends; the second was given the first's trained adapter."""
    assert second.other_logits is not None
    std = float(first.base_logits.std())
    start = max(float(np.abs(second.start[n] - v).max()) for n, v in first.start.items())
    losses = np.abs(np.divide(second.losses, first.losses) - 1)
    gradients = _largest_relative(second.gradients, first.gradients)
    steps = f"losses of {len(losses)} steps, relative"
    return [
        Law("L1", "logits of the base", _gap(second.base_logits, first.base_logits), 1e-4 * std),
        Law("L2", "adapter at the start", start, 0.0),
        Law("L4", "loss of one step, relative", float(losses[0]), 2e-6),
        Law("L4", "gradients of one step, relative", gradients, 1e-5),
        Law("L5", steps, float(losses.max()), 1e-3),
        Law(
            "L6",
            "logits with the other's trained adapter",
            _gap(second.other_logits, first.trained_logits),
            1e-4 * std,
        ),
    ]


def _gap(first: Float32, second: Float32) -> float:
    return float(np.abs(first - second).max())


def _largest_relative(found: Tensors, expected: Tensors) -> float:
    """Over tensors, |difference| / |expected|; NaN stays NaN."""
    sizes = [np.linalg.norm(value) for value in expected.values()]
    gaps = [np.linalg.norm(found[name] - value) for name, value in expected.items()]
    return float(np.max(np.divide(gaps, np.maximum(sizes, 1e-30))))
