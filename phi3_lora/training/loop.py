"""The one training loop. To follow a step: fit -> _take_step -> Engine.train_step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from phi3_lora.config.training import Strategy, TrainingConfig
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.batching import rank_share
from phi3_lora.engine.protocol import Engine
from phi3_lora.errors import TrainingError
from phi3_lora.inference.evaluation import evaluate
from phi3_lora.training.metrics import EvalMetrics, TrainMetrics, Window
from phi3_lora.training.observer import Observer
from phi3_lora.training.plan.protocol import Step, StepPlan
from phi3_lora.training.plan.schedule import learning_rate
from phi3_lora.training.progress import Progress
from phi3_lora.training.signals import StopRequest


@dataclass(frozen=True, slots=True)
class Task:
    """The steps to take and the documents to evaluate on."""

    config: TrainingConfig
    plan: StepPlan
    eval_documents: Sequence[Document] = ()

    def lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        total = self.plan.total_steps
        return learning_rate(
            step,
            kind=self.config.lr_scheduler_type,
            peak_lr=self.config.learning_rate,
            warmup_steps=self.config.num_warmup_steps(total),
            total_steps=total,
        )

    def is_due(self, step: Step, strategy: Strategy, every_steps: int) -> bool:
        """Return whether an event is due at a step; at the last step it is, except for `no`."""
        if strategy == "no":
            return False
        is_time = step.ends_epoch if strategy == "epoch" else step.number % every_steps == 0
        return is_time or step.number == self.plan.total_steps


def fit(
    engine: Engine, task: Task, observer: Observer, progress: Progress, stop: StopRequest
) -> Progress:
    """Train to the end of the plan, or until a stop is requested.

    Args:
        engine: the model.
        task: the steps and the validation documents.
        observer: receives the events.
        progress: the progress so far; it is updated in place and returned.
        stop: becomes true when a signal requests a stop. The current step is finished first.

    Raises:
        TrainingError: when the loss or the gradient norm is not finite.
        DataError: when streamed data cannot be used.
        CheckpointError: when streamed data is not what it was before the run resumed.
    """
    config = task.config
    saved = progress.step
    steps = task.plan.steps(progress.step, progress.position, is_stopped=lambda: bool(stop))
    for step in steps:
        loss, grad_norm = _take_step(engine, task, step, progress)
        observer.on_step(progress, loss)
        number, is_last = step.number, step.number == task.plan.total_steps
        if number % config.logging_steps == 0 or is_last:
            progress.last_loss = progress.window.loss
            metrics = _train_metrics(engine, task, step, progress.window, grad_norm)
            progress.window = Window()
            observer.on_metrics(metrics)
        every = config.eval_steps or config.logging_steps
        if task.eval_documents and task.is_due(step, config.eval_strategy, every):
            _evaluate(engine, task, observer, progress)
        if stop or is_last or task.is_due(step, config.save_strategy, config.save_steps):
            observer.on_checkpoint_due(progress)
            saved = number
        if stop:
            break
    # If the stop came while data was read, the loop ended without saving its last step.
    if stop and saved < progress.step:
        observer.on_checkpoint_due(progress)
    return progress


def _take_step(engine: Engine, task: Task, step: Step, progress: Progress) -> tuple[float, float]:
    """Take one optimizer step on this rank's share of the documents.

    Returns:
        Loss in nats per supervised token, and L2 norm of the gradients before clipping.
    """
    began = time.perf_counter()
    loss_tokens = sum(d.loss_tokens for d in step.documents)
    result = engine.train_step(
        make_batch(rank_share(step.documents, engine.rank, engine.world_size)),
        loss_tokens=loss_tokens,
        lr=task.lr(step.number),
        step=step.number,
    )
    loss, grad_norm = float(result.loss), float(result.grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        sources = ", ".join(d.source for d in step.documents[:4])
        raise TrainingError(
            f"step {step.number}: the loss is {loss}, the gradient norm {grad_norm}; lower the "
            f"learning rate (now {task.config.learning_rate:g}) or look at the rows of this step: "
            f"{sources}"
        )
    seconds = time.perf_counter() - began
    tokens = sum(len(d.tokens) for d in step.documents)
    progress.step = step.number
    progress.position = step.position
    progress.tokens += tokens
    progress.seconds += seconds
    progress.window.add(
        nats=loss * loss_tokens, loss_tokens=loss_tokens, tokens=tokens, seconds=seconds
    )
    return loss, grad_norm


def _train_metrics(
    engine: Engine, task: Task, step: Step, window: Window, grad_norm: float
) -> TrainMetrics:
    """Return the metrics of the steps in a window; its last step is this step."""
    return TrainMetrics(
        step=step.number,
        epoch=round(step.epoch, 6),
        loss=window.loss,
        grad_norm=grad_norm,
        lr=task.lr(step.number),
        loss_tokens=window.loss_tokens,
        tokens=window.tokens,
        step_seconds=window.seconds / window.steps,
        tokens_per_second=window.tokens / max(window.seconds, 1e-9),
        peak_memory_bytes=engine.peak_memory_bytes(),
        plan_hash=None if step.position is None else task.plan.hash(step.position),
    )


def _evaluate(engine: Engine, task: Task, observer: Observer, progress: Progress) -> None:
    evaluation = evaluate(engine, task.eval_documents)
    observer.on_metrics(EvalMetrics.of(evaluation, progress.step))
    if progress.best_eval_loss is None or evaluation.loss < progress.best_eval_loss:
        progress.best_eval_loss = evaluation.loss
        observer.on_best(progress, evaluation)
