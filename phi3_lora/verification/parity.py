"""Measurement of the laws of parity on a user's model, data and adapter.

One backend is open at a time. Its numbers are kept and compared with those of the other backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.initialization import initial_weights
from phi3_lora.adapters.names import is_b
from phi3_lora.arrays import Float32, Tensors
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.engine.protocol import Backend, Engine
from phi3_lora.engine.random_streams import uniform
from phi3_lora.engine.request import LoadRequest
from phi3_lora.inference.base_model import CheckedModel, FoundModel
from phi3_lora.inference.loading import check_for_backend

DOCUMENTS_PER_STEP = 4
_LEARNING_RATE = 1e-4
_LOGIT_ROWS = 64
"""Number of positions whose logits are compared; logits of all would fill the memory."""


@dataclass(frozen=True, slots=True)
class Law:
    """A measured law."""

    law: str
    what: str
    value: float
    gate: float

    @property
    def holds(self) -> bool:
        """True if the value is within the gate; false for NaN."""
        return bool(self.value <= self.gate)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {**asdict(self), "holds": self.holds}


@dataclass(frozen=True, slots=True)
class Numbers:
    """The measurements of one backend; logits are (rows, vocabulary)."""

    base_logits: Float32
    start: Tensors
    """The adapter, read back before the first step."""
    gradients: Tensors
    """Gradients of the first step, from one batch of its documents."""
    gradients_alone: Tensors
    """Gradients of the first step, summed over single documents in reverse order."""
    losses: list[float]
    """Loss of each step, in nats per supervised token."""
    trained: Tensors
    trained_logits: Float32
    other_logits: Float32 | None
    """Logits with the adapter that the other backend trained; None for the first backend."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The model, adapter and documents that each backend runs."""

    base: CheckedModel
    documents: Sequence[Document]
    spec: LoraSpec
    start: Tensors
    num_steps: int

    def steps(self) -> list[list[Document]]:
        """Return the documents of each step; after the last document the first follows."""
        endless = itertools.cycle(self.documents)
        return [list(itertools.islice(endless, DOCUMENTS_PER_STEP)) for _ in range(self.num_steps)]


def random_start(spec: LoraSpec, shapes: dict[str, tuple[int, int]]) -> Tensors:
    """Make an adapter whose B is not 0, since with B = 0 the gradient of A is exactly 0."""
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
    """Measure the numbers of one backend that the laws compare.

    Args:
        trial: the model, adapter and documents.
        backend: the backend to measure.
        device: auto, cpu or gpu.
        other: the adapter that the other backend trained, if it ran before.
        dtype: dtype of the base model; the gates are for float32.
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


@dataclass(frozen=True, slots=True)
class ParityResult:
    """All laws that could be measured on this machine."""

    laws: tuple[Law, ...]
    backends: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """True if every law holds."""
        return all(law.holds for law in self.laws)

    def to_dict(self) -> dict[str, Any]:
        """Return the laws and the verdict by name, as --json prints them."""
        laws = [law.to_dict() for law in self.laws]
        return {"laws": laws, "backends": list(self.backends), "holds": self.holds}


@dataclass(frozen=True, slots=True)
class ParityInputs:
    """The model, documents and adapter to measure the laws with."""

    base: FoundModel
    documents: Sequence[Document]
    adapter: Adapter | None
    """The adapter to start from; None for random weights on every linear layer."""
    num_steps: int


def run_laws(
    inputs: ParityInputs,
    backends: Mapping[str, Backend],
    device: str,
    note: Callable[[str], None],
) -> ParityResult:
    """Measure the laws of parity on one or two backends, one after the other.

    Args:
        inputs: the model, documents and adapter.
        backends: one or two, by name; with one, only its own law is measured.
        device: auto, cpu or gpu.
        note: receives a text before long work, and a text if laws are left out.

    Raises:
        ModelError: when the weights cannot be used.
    """
    base, adapter = inputs.base, inputs.adapter
    shapes = base.config.linear_shapes()
    spec = LoraSpec.uniform(shapes, r=8, scaling=2.0) if adapter is None else adapter.spec
    start = random_start(spec, shapes) if adapter is None else adapter.weights
    # Check every backend before the first long measurement.
    checked = {name: check_for_backend(base, b, note) for name, b in backends.items()}
    laws: list[Law] = []
    measured: list[Numbers] = []
    for name, backend in backends.items():
        trial = Trial(checked[name], inputs.documents, spec, start, inputs.num_steps)
        other = measured[0].trained if measured else None
        measured.append(measure(trial, backend, device, other))
        laws += own_laws(name, measured[-1])
    if len(measured) == 2:
        laws = [*cross_laws(*measured), *laws]
    else:
        note("one backend only: the laws between backends were not run; verify needs just one")
    return ParityResult(tuple(laws), tuple(backends))


def own_laws(name: str, numbers: Numbers) -> list[Law]:
    """Return the law that needs only one backend."""
    value = _largest_relative(numbers.gradients_alone, numbers.gradients)
    return [Law("L7", f"{name}: gradients, documents together or alone, relative", value, 1e-5)]


def cross_laws(first: Numbers, second: Numbers) -> list[Law]:
    """Return the laws between two backends; the second also ran the adapter of the first."""
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
    """Return the largest |difference| / |expected| over tensors; NaN stays NaN."""
    sizes = [np.linalg.norm(value) for value in expected.values()]
    gaps = [np.linalg.norm(found[name] - value) for name, value in expected.items()]
    return float(np.max(np.divide(gaps, np.maximum(sizes, 1e-30))))
