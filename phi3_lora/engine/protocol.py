"""The border between the core and a backend: numpy arrays in, numpy arrays out.

A backend never sees a config file, a scheduler, a checkpoint or a log. The core never sees a
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
    """Whole documents laid end to end, without padding or an attention mask."""

    tokens: Int32
    """(T,) ids of all documents."""
    targets: Int32
    """(T,) the next token of the same document; 0 at its last position."""
    loss_mask: Bool
    """(T,) True where the loss counts; False at a document's last position."""
    doc_starts: Int32
    """(D + 1,) document d is tokens[doc_starts[d]:doc_starts[d + 1]]."""


class StepResult(NamedTuple):
    """Loss and gradient norm of one optimizer step; float() waits for the device."""

    loss: SupportsFloat
    """Nats of this rank's documents, divided by the supervised tokens of all ranks."""
    grad_norm: SupportsFloat
    """L2 norm over all adapter gradients, before clipping."""


class Scores(NamedTuple):
    """Scores of D documents, one number per document, each (D,)."""

    nats: NDArray[np.float64]
    """Sum of the negative log-probabilities of the supervised tokens."""
    correct: NDArray[np.int64]
    """Number of supervised tokens whose target has the largest logit."""
    supervised: NDArray[np.int64]
    """Number of supervised tokens."""


class Engine(Protocol):
    """A base model with LoRA and its optimizer on one device; all ranks call each method."""

    @property
    def rank(self) -> int:
        """Index of this process, from 0 to world_size - 1."""

    @property
    def world_size(self) -> int:
        """Number of processes that share each step."""

    @property
    def notes(self) -> Sequence[str]:
        """Messages for the user, one for each option of the request that has no effect here."""

    @property
    def lora_shapes(self) -> Mapping[str, tuple[int, int]]:
        """Module path -> (out, in) of each LoRA layer; the embedding has (hidden, vocabulary)."""

    @property
    def device_name(self) -> str:
        """Name of the device, for people to read."""

    @property
    def dtype(self) -> str:
        """The base model's compute dtype, for example float32."""

    def train_step(self, batch: Batch, *, loss_tokens: int, lr: float, step: int) -> StepResult:
        """Take one optimizer step.

        Args:
            batch: this rank's documents of the step.
            loss_tokens: supervised tokens of the step on all ranks.
            lr: the learning rate.
            step: number of the step, from 1.
        """

    def computed_tokens(self, lengths: NDArray[np.int64]) -> int:
        """Return the tokens that a step on documents of these lengths computes, with padding."""

    def gradients(self, batch: Batch, *, loss_tokens: int, step: int = 0) -> Tensors:
        """Return the gradients of sum(nats) / loss_tokens under PEFT names; update nothing."""

    def score(self, batch: Batch) -> Scores:
        """Score each document's supervised tokens, without dropout."""

    def logprobs(self, batch: Batch) -> Float32:
        """Return the log-probability of each target, (T,); 0 at a document's last position."""

    def logits(self, batch: Batch, rows: Int32) -> Float32:
        """Return the logits at the chosen positions, (len(rows), vocabulary)."""

    def base_only(self) -> AbstractContextManager[None]:
        """Return a context that turns the adapter off."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        """Generate an answer to each prompt.

        Prompts are decoded together. Each gets the answer that it would get alone.

        Yields:
            Index of a prompt and its next token id; a stop token is the last one.
        """

    def read_adapter(self) -> Tensors:
        """Return the adapter in float32 under PEFT names: lora_A (R, in), lora_B (out, R).

        DoRA adds lora_magnitude_vector (out,). Modules whose whole weight trains add that weight.
        """

    def write_adapter(self, weights: Tensors) -> None:
        """Replace the adapter; names and shapes must be exactly those of read_adapter."""

    def read_optimizer(self) -> Tensors:
        """Return the moments under the adapter's names, suffixed .exp_avg or .exp_avg_sq."""

    def write_optimizer(self, state: Tensors) -> None:
        """Replace the moments; an empty dict resets them."""

    def peak_memory_bytes(self) -> int:
        """Return the peak memory of the device; on a CPU, of the process."""

    def close(self) -> None:
        """Free the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendDescription:
    """The software and the devices that a backend runs on."""

    versions: dict[str, str]
    """Package name -> version."""
    devices: tuple[str, ...]
    """Names of the devices, the preferred one first."""
    num_threads: int
    """Threads that a computation on the CPU uses."""
    blas: str | None = None
    """Library that multiplies matrices on the CPU; None if the backend has only one."""

    def to_dict(self) -> dict[str, Any]:
        """Return values for JSON; `blas` only if it is set."""
        return {
            "versions": dict(self.versions),
            "devices": list(self.devices),
            **({} if self.blas is None else {"blas": self.blas}),
            "num_threads": self.num_threads,
        }


class Backend(Protocol):
    """A framework that can open engines, found in the entry-point group phi3_lora.backends."""

    name: str
    quantizations: frozenset[str]
    """Quantisations that this backend alone makes while loading."""

    def check(self, device: str = "auto") -> None:
        """Check that the backend can run on a device.

        Raises:
            BackendUnavailableError: if it cannot; the message gives the reason and a remedy.
        """

    def open(self, request: LoadRequest) -> Engine:
        """Load the base model and add the LoRA layers."""

    stock_tool: str
    """Name of the library that stock_logits uses: PEFT or mlx-lm."""
    stock_layout: str
    """Layout of the adapters that this library reads: peft or mlx."""

    def stock_logits(self, model_dir: Path, adapter_dir: Path, tokens: Int32) -> Float32:
        """Compute logits with another library's own reader and model, in float32 on a CPU.

        Args:
            model_dir: the base model.
            adapter_dir: the adapter, in the layout `stock_layout`.
            tokens: (T,) ids of one document.

        Returns:
            Logits, (T, vocabulary).

        Raises:
            AdapterError: when the library does not load the adapter.
        """

    def describe(self) -> BackendDescription:
        """Describe the software and the devices of this machine."""

    def diagnose(self) -> list[str]:
        """Return problems of this machine that make the backend slow, each with a remedy."""
