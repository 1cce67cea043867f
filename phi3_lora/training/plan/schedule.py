"""The learning rate of a step: a pure function, so a checkpoint keeps no scheduler state."""

from __future__ import annotations

import math

from phi3_lora.config.training import Scheduler


def learning_rate(
    step: int, *, kind: Scheduler, peak_lr: float, warmup_steps: int, total_steps: int
) -> float:
    """Return the learning rate of an optimizer step.

    The first update uses schedule(0), like transformers' Trainer, which steps its scheduler after
    the optimizer.

    Args:
        step: number of the step, from 1.
        kind: shape of the schedule.
        peak_lr: largest learning rate.
        warmup_steps: steps over which the rate rises from 0.
        total_steps: steps of the run.

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
