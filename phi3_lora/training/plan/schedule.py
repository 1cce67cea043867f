"""Step -> learning rate, a pure function, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, kind: str, peak_lr: float, warmup_steps: int, total_steps: int
) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    The first update uses schedule(0), as a Trainer that steps its scheduler after the optimizer.

    Source: transformers, optimization.py, get_{linear,cosine,constant}_schedule*.
    """
    done = step - 1
    if kind == "constant":
        return peak_lr
    if done < warmup_steps:
        return peak_lr * done / max(1, warmup_steps)
    if kind == "constant_with_warmup":
        return peak_lr
    progress = (done - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return peak_lr * max(0.0, 1.0 - progress)
    return peak_lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
