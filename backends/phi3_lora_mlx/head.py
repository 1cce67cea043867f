"""The output head and cross-entropy on the supervised rows, one chunk of rows at a time.

The forward pass of a chunk also computes the gradients of the head's input and of the head's
trained arrays. So no logits are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from phi3_lora.engine.scoring import RowScores
from phi3_lora_mlx.numerics import staged_sum
from phi3_lora_mlx.phi3 import Phi3

_CHUNK_ELEMENTS = 1 << 24
"""Most logits in a chunk."""

Head = Callable[[dict[str, mx.array], mx.array, slice], mx.array]
"""A function that returns logits (n, vocabulary).

Its arguments are the head's trained arrays by name, hidden states (n, hidden), and their slice of
the S rows.
"""


class HeadLoss(NamedTuple):
    """Loss of S supervised rows and its gradients."""

    nats: mx.array
    """Sum of the negative log-probabilities."""
    grad: mx.array
    """Gradient of nats with respect to the rows, (S, hidden)."""
    head_grads: dict[str, mx.array]
    """Gradients of nats with respect to the head's trained arrays, by name."""


def _chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // vocab_size)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _softmax(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return the largest logit (n, 1), exp(logits - largest), and its staged sum (n, 1)."""
    largest = logits.max(axis=-1, keepdims=True)
    exp = mx.exp(logits - largest)
    return largest, exp, staged_sum(exp)[:, None]


def head_loss(
    head: Head,
    trained: dict[str, mx.array],
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    vocab_size: int,
) -> HeadLoss:
    """Compute cross-entropy of the rows and its gradients.

    Args:
        head: the model's output head.
        trained: the head's trained arrays, by name.
        hidden: (S, hidden) final hidden states.
        targets: (S,) next tokens.
        weights: (S,) 1, or 0 for a row of padding.
        vocab_size: size of the model's vocabulary.
    """
    nats, grads = [], []
    head_grads: dict[str, mx.array] = {}
    names = list(trained)
    for part in _chunks(hidden.shape[0], vocab_size):
        rows = hidden[part]
        logits = head(trained, rows, part).astype(mx.float32)
        largest, exp, total = _softmax(logits)
        index = targets[part][:, None]
        chosen = mx.take_along_axis(logits, index, axis=-1)
        row_nats = (mx.log(total) + largest - chosen)[:, 0]
        nats.append(mx.where(weights[part] > 0, row_nats, 0.0))
        slope = exp / total
        slope = mx.put_along_axis(
            slope, index, mx.take_along_axis(slope, index, axis=-1) - 1.0, axis=-1
        )
        slope = (slope * weights[part][:, None]).astype(hidden.dtype)

        # Only the gradients are evaluated; the output of logits_of is not used.
        def logits_of(x: mx.array, *values: mx.array, part: slice = part) -> mx.array:
            return head(dict(zip(names, values, strict=True)), x, part)

        primals = [rows, *trained.values()]
        grad, *own = mx.vjp(logits_of, primals, [slope])[1]
        grads.append(grad)
        for name, value in zip(names, own, strict=True):
            head_grads[name] = head_grads[name] + value if name in head_grads else value
    return HeadLoss(staged_sum(mx.concatenate(nats)), mx.concatenate(grads), head_grads)


def head_scores(model: Phi3, hidden: mx.array, targets: mx.array, vocab_size: int) -> RowScores:
    """Return each target's log-probability, and whether its logit is the largest."""
    logprobs, correct = [], []
    for part in _chunks(hidden.shape[0], vocab_size):
        logits = model.head(hidden[part]).astype(mx.float32)
        largest, _, total = _softmax(logits)
        chosen = mx.take_along_axis(logits, targets[part][:, None], axis=-1)
        logprobs.append((chosen - largest - mx.log(total))[:, 0])
        correct.append(logits.argmax(axis=-1) == targets[part])
        mx.eval(logprobs[-1], correct[-1])
    return RowScores(np.array(mx.concatenate(logprobs)), np.array(mx.concatenate(correct)))
