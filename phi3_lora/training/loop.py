"""The one training loop. To follow a step: fit -> _take_step -> Engine.train_step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from phi3_lora.config.training import TrainingConfig
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.batching import rank_share
from phi3_lora.engine.protocol import Engine
from phi3_lora.errors import TrainingError
from phi3_lora.inference.evaluation import Evaluation, evaluate
from phi3_lora.training.metrics import Window
from phi3_lora.training.plan.protocol import Position, Step, StepPlan
from phi3_lora.training.plan.schedule import learning_rate
from phi3_lora.training.signals import StopRequest


@dataclass(slots=True)
class Progress:
    """Where a run stands; what a checkpoint stores besides tensors."""

    step: int = 0
    window: Window = field(default_factory=Window)
    best_eval_loss: float | None = None
    last_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    position: Position | None = None
    """The plan's, after this step."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, exact in JSON."""
        return {
            "step": self.step,
            "window": self.window.to_dict(),
            "best_eval_loss": self.best_eval_loss,
            "last_loss": self.last_loss,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "position": self.position,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Progress:
        """The inverse of to_dict; other keys are ignored."""
        names = ("step", "best_eval_loss", "last_loss", "tokens", "seconds")
        known = {name: state[name] for name in names}
        return cls(window=Window(**state["window"]), position=state.get("position"), **known)


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop calls; the loop itself touches no file and no screen."""

    on_step: Callable[[Progress, float], None] = lambda progress, loss: None
    """After each step, with the step's loss."""
    on_metrics: Callable[[dict[str, Any]], None] = lambda record: None
    """A line of metrics.jsonl."""
    on_checkpoint: Callable[[Progress], None] = lambda progress: None
    on_best: Callable[[Progress, Evaluation], None] = lambda progress, evaluation: None
    """After an evaluation better than all before."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be learnt and how."""

    config: TrainingConfig
    plan: StepPlan
    eval_documents: Sequence[Document] = ()

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        total = self.plan.total_steps
        return learning_rate(
            step,
            kind=self.config.lr_scheduler_type,
            peak_lr=self.config.learning_rate,
            warmup_steps=self.config.num_warmup_steps(total),
            total_steps=total,
        )

    def is_due(self, step: Step, strategy: str, every_steps: int) -> bool:
        """Whether an event of this strategy falls on a step; the last step counts unless `no`."""
        if strategy == "no":
            return False
        is_time = step.ends_epoch if strategy == "epoch" else step.number % every_steps == 0
        return is_time or step.number == self.plan.total_steps


def fit(
    engine: Engine, task: Task, hooks: Hooks, progress: Progress, stop: StopRequest
) -> Progress:
    """Train from where progress stands to the end of the plan, or until a stop is asked for.

    Raises:
        TrainingError: when the loss is not finite; nothing is saved after that.
    """
    config = task.config
    saved = progress.step
    steps = task.plan.steps(progress.step, progress.position, is_stopped=lambda: bool(stop))
    for step in steps:
        loss, grad_norm = _take_step(engine, task, step, progress)
        hooks.on_step(progress, loss)
        number, is_last = step.number, step.number == task.plan.total_steps
        if number % config.logging_steps == 0 or is_last:
            line = progress.window.line(
                step=number,
                epoch=step.epoch,
                grad_norm=grad_norm,
                lr=task.lr(number),
                peak_memory_bytes=engine.peak_memory_bytes(),
            )
            if step.position is not None:
                line["plan_hash"] = task.plan.hash(step.position)
            progress.last_loss = line["loss"]
            progress.window = Window()
            hooks.on_metrics(line)
        every = config.eval_steps or config.logging_steps
        if task.eval_documents and task.is_due(step, config.eval_strategy, every):
            _evaluate(engine, task, hooks, progress)
        if stop or is_last or task.is_due(step, config.save_strategy, config.save_steps):
            hooks.on_checkpoint(progress)
            saved = number
        if stop:
            break
    # Stopped while data was read.
    if stop and saved < progress.step:
        hooks.on_checkpoint(progress)
    return progress


def _take_step(engine: Engine, task: Task, step: Step, progress: Progress) -> tuple[float, float]:
    """One optimizer step on this rank's share of the step's documents."""
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


def _evaluate(engine: Engine, task: Task, hooks: Hooks, progress: Progress) -> None:
    evaluation = evaluate(engine, task.eval_documents)
    hooks.on_metrics(
        {
            "step": progress.step,
            "eval_loss": evaluation.loss,
            "eval_perplexity": evaluation.perplexity,
            "eval_token_accuracy": evaluation.token_accuracy,
            "eval_loss_tokens": evaluation.loss_tokens,
        }
    )
    if progress.best_eval_loss is None or evaluation.loss < progress.best_eval_loss:
        progress.best_eval_loss = evaluation.loss
        hooks.on_best(progress, evaluation)
