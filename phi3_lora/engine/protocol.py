"""The border between the core and a backend: plain numpy in, plain numpy out.

A backend never sees a config file, a scheduler, a checkpoint or a log; the core never sees a
device tensor. Shape letters: D documents, T tokens, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from phi3_lora.arrays import Bool, Float32, Int32, Tensors
from phi3_lora.engine.request import LoadRequest, Sampling


class Batch(NamedTuple):
    """Whole documents laid end to end: no padding, no attention mask."""

    tokens: Int32
    """(T,) all ids of each document."""
    targets: Int32
    """(T,) the next token of the same document; 0 at its last position."""
    loss_mask: Bool
    """(T,) True where the loss counts; False at a document's last position."""
    doc_starts: Int32
    """(D + 1,) document d is tokens[doc_starts[d]:doc_starts[d + 1]]."""


class StepResult(NamedTuple):
    """The report of one optimizer step; float() waits for the device."""

    loss: SupportsFloat
    """Nats per supervised token, of this rank's share divided by the step's global count."""
    grad_norm: SupportsFloat
    """L2 norm over all adapter gradients, before clipping."""


class Scores(NamedTuple):
    """Scores of D documents; each array is (D,)."""

    nats: NDArray[np.float64]
    """Sum of the negative log-probabilities of the supervised tokens."""
    correct: NDArray[np.int64]
    """Supervised tokens whose target has the largest logit."""
    supervised: NDArray[np.int64]
    """Supervised tokens."""


class Engine(Protocol):
    """A base model with LoRA and its optimizer on one device. Every method is collective."""

    @property
    def rank(self) -> int:
        """This process among world_size."""

    @property
    def world_size(self) -> int:
        """Number of processes that share each step."""

    @property
    def notes(self) -> Sequence[str]:
        """Parts of the request that have no effect here, for the user."""

    @property
    def lora_shapes(self) -> Mapping[str, tuple[int, int]]:
        """Module path -> (out, in) of every LoRA layer; of the embedding (hidden, vocabulary)."""

    @property
    def device_name(self) -> str:
        """The name of the device, for the user."""

    @property
    def dtype(self) -> str:
        """The base model's compute dtype, for example float32."""

    def train_step(self, batch: Batch, *, loss_tokens: int, lr: float, step: int) -> StepResult:
        """Take one optimizer step (the step-th, from 1) on this rank's share of its documents."""

    def computed_tokens(self, lengths: NDArray[np.int64]) -> int:
        """Tokens that a step of documents of these lengths computes on, padding included."""

    def gradients(self, batch: Batch, *, loss_tokens: int, step: int = 0) -> Tensors:
        """Gradients of sum(nats) / loss_tokens under PEFT names; nothing is updated."""

    def score(self, batch: Batch) -> Scores:
        """Score each document's supervised tokens, without dropout."""

    def logprobs(self, batch: Batch) -> Float32:
        """Log-probability of each target, (T,); 0 at each document's last position."""

    def logits(self, batch: Batch, rows: Int32) -> Float32:
        """Logits at the chosen positions, (len(rows), vocabulary)."""

    def base_only(self) -> AbstractContextManager[None]:
        """A context in which the model answers without its adapter."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        """Index of a prompt and its next token id, as they come; a stop token comes last.

        Prompts are decoded together, and each gets the answer that it would get alone.
        """

    def read_adapter(self) -> Tensors:
        """The adapter as float32 under PEFT names: lora_A (R, in), lora_B (out, R).

        With DoRA also lora_magnitude_vector (out,), and whole weights where those train.
        """

    def write_adapter(self, weights: Tensors) -> None:
        """Replace the adapter; names and shapes must be exactly those of read_adapter."""

    def read_optimizer(self) -> Tensors:
        """Moments under the adapter's names with the suffix .exp_avg or .exp_avg_sq."""

    def write_optimizer(self, state: Tensors) -> None:
        """Replace the moments; an empty dict resets them."""

    def peak_memory_bytes(self) -> int:
        """Largest memory the device (on a CPU: the process) has held."""

    def close(self) -> None:
        """Free the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendDescription:
    """The software and the devices that a backend runs on."""

    versions: dict[str, str]
    """Package -> version."""
    devices: tuple[str, ...]
    """Names, the preferred device first."""
    num_threads: int
    """Threads that a computation on the CPU uses."""
    blas: str | None = None
    """Library that multiplies matrices on the CPU, if the backend can have several."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `blas` only where it is known."""
        return {
            "versions": dict(self.versions),
            "devices": list(self.devices),
            **({} if self.blas is None else {"blas": self.blas}),
            "num_threads": self.num_threads,
        }


class Backend(Protocol):
    """A way to open engines; found through the entry-point group phi3_lora.backends."""

    name: str
    quantizations: frozenset[str]
    """Quantisations of its own that it makes while loading."""

    def check(self, device: str = "auto") -> None:
        """Make sure that the backend can run here.

        Raises:
            BackendUnavailableError: with the reason and what to install or choose.
        """

    def open(self, request: LoadRequest) -> Engine:
        """Load the base model and put the LoRA layers on it."""

    stock_tool: str
    """The tool whose own reader stock_logits asks."""
    stock_layout: str
    """The layout of adapters that it reads: peft or mlx."""

    def stock_logits(self, model_dir: Path, adapter_dir: Path, tokens: Int32) -> Float32:
        """Logits (T, vocabulary) of one document, by another tool than ours, in float32 on a CPU.

        Raises:
            AdapterError: when that tool does not load the adapter.
        """

    def describe(self) -> BackendDescription:
        """Describe the software and the devices of this machine."""

    def diagnose(self) -> list[str]:
        """List the causes that slow this backend down here, each with a line that mends it."""
