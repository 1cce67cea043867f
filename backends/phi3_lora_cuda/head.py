"""The output head and cross-entropy, only where the loss counts, a chunk of rows at a time.

The head is frozen, so the forward pass can return the gradient of its input at once: no logits
are kept and none are recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits that a chunk holds at most; fewer would leave a GPU idle, more a CPU's cache."""


class HeadLoss(NamedTuple):
    """Of S supervised rows."""

    nats: Tensor
    """Sum of the negative log-probabilities, a float64 scalar."""
    grad: Tensor
    """Gradient of nats with respect to the rows, (S, hidden)."""


class RowScores(NamedTuple):
    """Of each row, (S,)."""

    logprob: Tensor
    is_correct: Tensor


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS[hidden.device.type] // len(weight))
    for start in range(0, len(hidden), size):
        yield slice(start, start + size)


def _softmax(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, exp(logits - max) and the log of its sum plus max; sums in float64 on a CPU.

    A CPU sums a row of the vocabulary in one running float32, which loses 2e-5.
    """
    logits = (hidden @ weight.T).float()
    largest = logits.amax(dim=-1, keepdim=True)
    exp = torch.exp(logits - largest)
    exact = torch.float64 if logits.device.type == "cpu" else torch.float32
    total = exp.sum(dim=-1, keepdim=True, dtype=exact)
    return logits, exp / total.float(), (total.log() + largest.to(exact)).squeeze(-1)


@torch.no_grad()
def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> HeadLoss:
    """Cross-entropy of the rows and its gradient.

    Args:
        hidden: (S, hidden) final hidden states of the supervised rows.
        weight: (vocabulary, hidden).
        targets: (S,) next tokens.
    """
    grad = torch.empty_like(hidden)
    nats = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part in _chunks(hidden, weight):
        logits, probability, log_total = _softmax(hidden[part], weight)
        index = targets[part, None]
        nats += (log_total - logits.gather(1, index).squeeze(1).to(log_total.dtype)).double().sum()
        probability.scatter_add_(1, index, torch.full_like(index, -1, dtype=probability.dtype))
        grad[part] = probability.to(weight.dtype) @ weight
    return HeadLoss(nats, grad)


@torch.no_grad()
def head_scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> RowScores:
    """Log-probability of each row's target and whether its logit is the largest."""
    logprob = torch.empty(len(hidden), dtype=torch.float64)
    is_correct = torch.empty(len(hidden), dtype=torch.bool)
    for part in _chunks(hidden, weight):
        logits, _, log_total = _softmax(hidden[part], weight)
        chosen = logits.gather(1, targets[part, None]).squeeze(1)
        logprob[part] = (chosen.to(log_total.dtype) - log_total).double().cpu()
        is_correct[part] = (logits.argmax(dim=-1) == targets[part]).cpu()
    return RowScores(logprob, is_correct)
