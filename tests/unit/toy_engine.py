"""A toy Engine in numpy: a frozen embedding, one linear layer with LoRA, and a frozen head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from phi3_lora.arrays import Float32, Int32, Tensors
from phi3_lora.engine.protocol import Batch, Scores, StepResult
from phi3_lora.engine.request import OptimSpec, Sampling
from tests.tiny import start_weights

MODULE = "model.layers.0.mlp.down_proj"
A_NAME = f"base_model.model.{MODULE}.lora_A.weight"
B_NAME = f"base_model.model.{MODULE}.lora_B.weight"


class ToyEngine:
    """An engine that computes in float64; adapter and moments are float32 between steps."""

    device_name = "numpy"
    dtype = "float64"

    def __init__(
        self,
        *,
        vocab_size: int = 32,
        hidden_size: int = 8,
        r: int = 2,
        scaling: float = 2.0,
        optim: OptimSpec | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.notes: list[str] = []
        self.lora_shapes: Mapping[str, tuple[int, int]] = {MODULE: (hidden_size, hidden_size)}
        self._scaling = scaling
        self._optim = optim or OptimSpec()
        rng = np.random.default_rng(seed)
        self._embedding = rng.normal(0.0, 1.0, (vocab_size, hidden_size))
        self._linear = rng.normal(0.0, hidden_size**-0.5, (hidden_size, hidden_size))
        self._head = rng.normal(0.0, hidden_size**-0.5, (vocab_size, hidden_size))
        self._weights = start_weights(self.lora_shapes, r=r, seed=seed)
        self._moments: Tensors = {}
        self.write_optimizer({})
        self.nan_at_step = 0
        self.num_scored = 0
        self.is_closed = False

    def _forward(self, tokens: Int32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x = self._embedding[tokens]
        low = x @ self._weights[A_NAME].astype(np.float64).T
        delta = low @ self._weights[B_NAME].astype(np.float64).T
        return x, low, (x @ self._linear.T + self._scaling * delta) @ self._head.T

    def _log_softmax(self, tokens: Int32) -> np.ndarray:
        logits = self._forward(tokens)[2]
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    def _nats(self, batch: Batch) -> np.ndarray:
        picked = self._log_softmax(batch.tokens)[np.arange(len(batch.tokens)), batch.targets]
        return np.where(batch.loss_mask, -picked, 0.0)

    def train_step(self, batch: Batch, *, loss_tokens: int, lr: float, step: int) -> StepResult:
        loss = float(self._nats(batch).sum()) / loss_tokens
        if step == self.nan_at_step:
            loss = math.nan
        gradients = self.gradients(batch, loss_tokens=loss_tokens, step=step)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        limit = self._optim.max_grad_norm
        shrink = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        for name, gradient in gradients.items():
            self._update(name, gradient * shrink, lr, step)
        return StepResult(loss, norm)

    def _update(self, name: str, gradient: np.ndarray, lr: float, step: int) -> None:
        beta1, beta2 = self._optim.betas
        first, second = f"{name}.exp_avg", f"{name}.exp_avg_sq"
        m = beta1 * self._moments[first].astype(np.float64) + (1 - beta1) * gradient
        v = beta2 * self._moments[second].astype(np.float64) + (1 - beta2) * gradient**2
        root = np.sqrt(v / (1 - beta2**step)) + self._optim.eps
        value = self._weights[name].astype(np.float64) * (1 - lr * self._optim.weight_decay)
        value -= lr * (m / (1 - beta1**step)) / root
        self._weights[name] = value.astype(np.float32)
        self._moments[first], self._moments[second] = m.astype(np.float32), v.astype(np.float32)

    def computed_tokens(self, lengths: np.ndarray) -> int:
        return int(lengths.sum())

    def gradients(self, batch: Batch, *, loss_tokens: int, step: int = 0) -> Tensors:
        x, low, _ = self._forward(batch.tokens)
        error = np.exp(self._log_softmax(batch.tokens))
        error[np.arange(len(batch.tokens)), batch.targets] -= 1.0
        error *= batch.loss_mask[:, None] / loss_tokens
        at_delta = self._scaling * (error @ self._head)
        b = self._weights[B_NAME].astype(np.float64)
        # float64, against the protocol: a test sums the ranks' shares to 1e-12.
        return {A_NAME: (at_delta @ b).T @ x, B_NAME: at_delta.T @ low}

    def score(self, batch: Batch) -> Scores:
        self.num_scored += 1
        hits = (self._log_softmax(batch.tokens).argmax(axis=1) == batch.targets) & batch.loss_mask
        starts = batch.doc_starts[:-1]
        return Scores(
            np.add.reduceat(self._nats(batch), starts),
            np.add.reduceat(hits.astype(np.int64), starts),
            np.add.reduceat(batch.loss_mask.astype(np.int64), starts),
        )

    def logprobs(self, batch: Batch) -> Float32:
        picked = self._log_softmax(batch.tokens)[np.arange(len(batch.tokens)), batch.targets]
        picked[batch.doc_starts[1:] - 1] = 0.0
        return picked.astype(np.float32)

    def logits(self, batch: Batch, rows: Int32) -> Float32:
        return self._forward(batch.tokens)[2][rows].astype(np.float32)

    def base_only(self) -> AbstractContextManager[None]:
        return nullcontext()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        raise NotImplementedError

    def read_adapter(self) -> Tensors:
        return {name: value.copy() for name, value in self._weights.items()}

    def write_adapter(self, weights: Tensors) -> None:
        assert {n: w.shape for n, w in weights.items()} == {
            n: w.shape for n, w in self._weights.items()
        }
        self._weights = {name: value.copy() for name, value in weights.items()}

    def read_optimizer(self) -> Tensors:
        return {name: value.copy() for name, value in self._moments.items()}

    def write_optimizer(self, state: Tensors) -> None:
        zeros = {
            f"{name}.{kind}": np.zeros_like(value)
            for name, value in self._weights.items()
            for kind in ("exp_avg", "exp_avg_sq")
        }
        self._moments = {name: value.copy() for name, value in (state or zeros).items()}

    def peak_memory_bytes(self) -> int:
        return 1

    def close(self) -> None:
        self.is_closed = True
