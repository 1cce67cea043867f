"""The progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from phi3_lora.training.facts import RunFacts, RunStart
from phi3_lora.training.metrics import EvalMetrics, TrainMetrics
from phi3_lora.training.observer import Observer
from phi3_lora.training.plan.facts import StepFacts
from phi3_lora.training.progress import Progress


class ConsoleObserver(Observer):
    """Observer that prints to stderr; stdout is for results."""

    def __init__(self, *, verbosity: int = 0) -> None:
        """Open the console.

        Args:
            verbosity: -1 prints notes only, 0 also progress, 1 also every saved file.
        """
        self.console = Console(stderr=True, highlight=False)
        self._verbosity = verbosity
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._speed = ""

    def on_note(self, text: str) -> None:
        """Print the text on a line, above the bar."""
        self._say(f"note: {text}")

    def on_start(self, start: RunStart) -> None:
        """Print the facts of the run, one subject a line, and show the bar."""
        if self._verbosity < 0:
            return
        facts, environment = start.facts, start.environment
        shape = f" (the shape of {facts.family})" if facts.family else ""
        self._say(
            f"model {facts.model}{shape}: {facts.num_parameters / 1e6:,.1f} M parameters, "
            f"{facts.num_trainable_parameters:,} trainable in {facts.num_modules} modules"
        )
        self._say(_data_line(facts))
        self._say(_plan_line(facts))
        self._say(_step_line(facts.plan.steps, start.padding))
        self._say(f"backend {environment.backend} on {environment.device}, {environment.dtype}")
        if start.step:
            self._say(f"resuming after step {start.step:,}")
        if self.console.is_terminal:
            self._bar = Bar(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=facts.plan.total_steps, status="")
            self._bar.update(self._task, completed=start.step)
            self._bar.start()

    def _say(self, text: str) -> None:
        # A log file has no width to wrap at.
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def on_step(self, progress: Progress, loss: float) -> None:
        """Move the bar to the finished step."""
        if self._bar is not None and self._task is not None:
            status = f"loss {loss:.4f}{self._speed}"
            self._bar.update(self._task, completed=progress.step, status=status)

    def on_metrics(self, metrics: TrainMetrics | EvalMetrics) -> None:
        """Print the metrics on a line."""
        if isinstance(metrics, TrainMetrics):
            self._speed = (
                f" | {metrics.tokens_per_second:,.0f} tokens/s"
                f" | {metrics.peak_memory_bytes / 2**30:.1f} GiB"
            )
            line = (
                f"loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  grad {metrics.grad_norm:.3f}  "
                f"{metrics.tokens_per_second:,.0f} tokens/s"
            )
        else:
            line = (
                f"validation loss {metrics.eval_loss:.4f}  perplexity "
                f"{metrics.eval_perplexity:.3f}  token accuracy {metrics.eval_token_accuracy:.1%}"
            )
        if self._verbosity >= 0:
            self._say(f"step {metrics.step:>6,}  {line}")

    def on_checkpoint(self, folder: Path) -> None:
        """Print the folder."""
        if self._verbosity > 0:
            self._say(f"saved {folder}")

    def on_finish(self, progress: Progress) -> None:
        """Leave the bar at the last step."""
        self.close()

    def close(self) -> None:
        """Stop the bar; a second call has no effect."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _data_line(facts: RunFacts) -> str:
    streamed = facts.plan.streamed
    known = streamed or facts.plan
    text = (
        f"{known.num_documents:,} documents, {known.num_tokens:,} tokens, "
        f"{known.loss_tokens:,} in the loss"
    )
    if streamed:
        text = f"streamed, {streamed.buffer_size:,} rows at a time; the first give {text}"
    return f"data: {text}; {facts.num_eval_documents:,} to validate on"


def _plan_line(facts: RunFacts) -> str:
    epoch = facts.plan.steps_per_epoch
    return (
        f"plan: {facts.plan.total_steps:,} steps of {facts.documents_per_step} documents"
        + (f" ({epoch:,} an epoch)" if epoch else "")
        + f" on any number of ranks, hash {facts.plan_hash[:12]}"
        + ("" if epoch else ", then one of the steps taken in each line of metrics")
    )


def _step_line(steps: StepFacts, padding: float) -> str:
    tokens = steps.step_tokens
    text = "steps: unknown, the first rows give no document"
    if tokens:
        text = f"steps: of {tokens.least:,} to {tokens.most:,} tokens, {tokens.mean:,} on average"
    if steps.row_fill is not None:
        text += f"; packed rows are {steps.row_fill:.1%} full"
    return f"{text}; padding {padding:.1%}"
