"""The output head and cross-entropy on the supervised rows, one chunk of rows at a time.

The forward pass of a chunk also computes the gradients of the head's input and of the head's
trained parameters. So logits are neither kept nor recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from phi3_lora.engine.scoring import RowScores

_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Most logits in a chunk: fewer would leave a GPU idle, more would not fit a CPU's cache."""


class HeadLoss(NamedTuple):
    """Loss of S supervised rows and its gradient."""

    nats: Tensor
    """Sum of the negative log-probabilities, a float64 scalar."""
    grad: Tensor
    """Gradient of nats with respect to the rows, (S, hidden)."""


Head = Callable[[Tensor, slice], Tensor]
"""A function of hidden states (n, hidden) and their slice of the rows that returns logits."""


def _chunks(hidden: Tensor, vocab_size: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS[hidden.device.type] // vocab_size)
    for start in range(0, len(hidden), size):
        yield slice(start, start + size)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities and log(sum(exp(logits))); sums are in float64 on a CPU.

    A CPU adds a row of logits in one running float32 total, with an error of 2e-5.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    exp = torch.exp(logits - largest)
    exact = torch.float64 if logits.device.type == "cpu" else torch.float32
    total = exp.sum(dim=-1, keepdim=True, dtype=exact)
    return exp / total.float(), (total.log() + largest.to(exact)).squeeze(-1)


@torch.no_grad()
def head_loss(hidden: Tensor, head: Head, targets: Tensor, vocab_size: int) -> HeadLoss:
    """Compute cross-entropy and its gradient; add to the gradients of the head's parameters.

    Args:
        hidden: (S, hidden) final hidden states of the supervised rows.
        head: the model's output head.
        targets: (S,) next tokens.
        vocab_size: size of the model's vocabulary.
    """
    grad = torch.empty_like(hidden)
    nats = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part in _chunks(hidden, vocab_size):
        rows = hidden[part].requires_grad_()
        with torch.enable_grad():
            raw = head(rows, part)
        logits = raw.detach().float()
        probability, log_total = _softmax(logits)
        index = targets[part, None]
        nats += (log_total - logits.gather(1, index).squeeze(1).to(log_total.dtype)).double().sum()
        probability.scatter_add_(1, index, torch.full_like(index, -1, dtype=probability.dtype))
        raw.backward(probability.to(raw.dtype))
        assert rows.grad is not None
        grad[part] = rows.grad
    return HeadLoss(nats, grad)


@torch.no_grad()
def head_scores(hidden: Tensor, head: Head, targets: Tensor, vocab_size: int) -> RowScores:
    """Return each target's log-probability, and whether its logit is the largest."""
    logprob = torch.empty(len(hidden), dtype=torch.float64)
    is_correct = torch.empty(len(hidden), dtype=torch.bool)
    for part in _chunks(hidden, vocab_size):
        logits = head(hidden[part], part).float()
        _, log_total = _softmax(logits)
        chosen = logits.gather(1, targets[part, None]).squeeze(1)
        logprob[part] = (chosen.to(log_total.dtype) - log_total).double().cpu()
        is_correct[part] = (logits.argmax(dim=-1) == targets[part]).cpu()
    return RowScores(logprob.numpy(), is_correct.numpy())
