"""A run on the terminal: a progress bar where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from phi3_lora.training.observer import Progressing


class ConsoleObserver:
    """Prints to stderr; stdout is for results."""

    def __init__(self, *, verbosity: int = 0) -> None:
        """Open the console.

        Args:
            verbosity: -1 prints notes only, 0 also progress, 1 also every saved file.
        """
        self.console = Console(stderr=True, highlight=False)
        self._verbosity = verbosity
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._speed = ""

    def note(self, text: str) -> None:
        """One line, also while the bar is shown."""
        self._say(f"note: {text}")

    def start(self, facts: dict[str, Any], step: int) -> None:
        """The run in four lines, then the bar."""
        if self._verbosity < 0:
            return
        shape = f" (the shape of {facts['family']})" if facts["family"] else ""
        self._say(
            f"model {facts['model']}{shape}: {facts['num_parameters'] / 1e6:,.1f} M parameters, "
            f"{facts['num_trainable_parameters']:,} trainable in {facts['num_modules']} modules"
        )
        self._say(_data_line(facts))
        self._say(_plan_line(facts))
        self._say(_step_line(facts))
        self._say(f"backend {facts['backend']} on {facts['device']}, {facts['dtype']}")
        if step:
            self._say(f"resuming after step {step:,}")
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task("", total=facts["total_steps"], status="")
            self._progress.update(self._task, completed=step)
            self._progress.start()

    def _say(self, text: str) -> None:
        # A log file has no width to wrap at.
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def step(self, progress: Progressing, loss: float) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            status = f"loss {loss:.4f}{self._speed}"
            self._progress.update(self._task, completed=progress.step, status=status)

    def metrics(self, record: dict[str, Any]) -> None:
        """A line of metrics."""
        if "tokens_per_second" in record:
            self._speed = (
                f" | {record['tokens_per_second']:,.0f} tokens/s"
                f" | {record['peak_memory_bytes'] / 2**30:.1f} GiB"
            )
        if self._verbosity < 0:
            return
        if "loss" in record:
            self._say(
                f"step {record['step']:>6,}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
                f"grad {record['grad_norm']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
            )
        elif "eval_loss" in record:
            self._say(
                f"step {record['step']:>6,}  validation loss {record['eval_loss']:.4f}  perplexity "
                f"{record['eval_perplexity']:.3f}  token accuracy "
                f"{record['eval_token_accuracy']:.1%}"
            )

    def saved(self, path: Path) -> None:
        """A checkpoint was written."""
        if self._verbosity > 0:
            self._say(f"saved {path}")

    def finish(self) -> None:
        """Leave the bar as it is."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _data_line(facts: dict[str, Any]) -> str:
    streamed = facts.get("streamed")
    known = streamed or facts
    text = (
        f"{known['num_documents']:,} documents, {known['num_tokens']:,} tokens, "
        f"{known['loss_tokens']:,} in the loss"
    )
    if streamed:
        text = f"streamed, {streamed['buffer_size']:,} rows at a time; the first give {text}"
    return f"data: {text}; {facts['num_eval_documents']:,} to validate on"


def _plan_line(facts: dict[str, Any]) -> str:
    epoch = facts["steps_per_epoch"]
    return (
        f"plan: {facts['total_steps']:,} steps of {facts['documents_per_step']} documents"
        + (f" ({epoch:,} an epoch)" if epoch else "")
        + f" on any number of ranks, hash {facts['plan_hash'][:12]}"
        + ("" if epoch else ", then one of the steps taken in each line of metrics")
    )


def _step_line(facts: dict[str, Any]) -> str:
    tokens, fill = facts["step_tokens"], facts["row_fill"]
    text = "steps: unknown, the first rows give no document"
    if tokens:
        span = f"{tokens['least']:,} to {tokens['most']:,}"
        text = f"steps: of {span} tokens, {tokens['mean']:,} on average"
    if fill is not None:
        text += f"; packed rows are {fill:.1%} full"
    return f"{text}; padding {facts['padding']:.1%}"
