"""The events of a run and the interface that receives them.

Each event of a run goes to several observers in this order: the writers of metrics.jsonl and of
adapters, the caller's observer (for example the console), and the writer of checkpoints.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from phi3_lora.inference.evaluation import Evaluation
from phi3_lora.training.facts import RunStart
from phi3_lora.training.metrics import EvalMetrics, TrainMetrics
from phi3_lora.training.progress import Progress


class Observer(Protocol):
    """Receiver of the events of a run; a subclass overrides only the methods that it needs.

    An exception in a method stops the run.
    """

    def on_note(self, text: str) -> None:
        """Receive a text that the user should see."""
        return

    def on_start(self, start: RunStart) -> None:
        """Receive the facts of the run before its first step."""
        return

    def on_step(self, progress: Progress, loss: float) -> None:
        """Receive the loss of a finished step, in nats per supervised token."""
        return

    def on_metrics(self, metrics: TrainMetrics | EvalMetrics) -> None:
        """Receive a record that was written to metrics.jsonl."""
        return

    def on_best(self, progress: Progress, evaluation: Evaluation) -> None:
        """Receive an evaluation with the lowest loss so far; its adapter is saved."""
        return

    def on_checkpoint_due(self, progress: Progress) -> None:
        """Receive the progress before a checkpoint of it is saved."""
        return

    def on_checkpoint(self, folder: Path) -> None:
        """Receive the folder of a checkpoint that was saved."""
        return

    def on_finish(self, progress: Progress) -> None:
        """Receive the end of a run that took all its steps; its adapter is saved."""
        return


class Observers(Observer):
    """Several observers as one; each event goes to them in order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_note(self, text: str) -> None:
        """Pass the text on."""
        for observer in self._observers:
            observer.on_note(text)

    def on_start(self, start: RunStart) -> None:
        """Pass the facts on."""
        for observer in self._observers:
            observer.on_start(start)

    def on_step(self, progress: Progress, loss: float) -> None:
        """Pass the finished step on."""
        for observer in self._observers:
            observer.on_step(progress, loss)

    def on_metrics(self, metrics: TrainMetrics | EvalMetrics) -> None:
        """Pass the record on."""
        for observer in self._observers:
            observer.on_metrics(metrics)

    def on_best(self, progress: Progress, evaluation: Evaluation) -> None:
        """Pass the evaluation on."""
        for observer in self._observers:
            observer.on_best(progress, evaluation)

    def on_checkpoint_due(self, progress: Progress) -> None:
        """Pass the request on."""
        for observer in self._observers:
            observer.on_checkpoint_due(progress)

    def on_checkpoint(self, folder: Path) -> None:
        """Pass the folder on."""
        for observer in self._observers:
            observer.on_checkpoint(folder)

    def on_finish(self, progress: Progress) -> None:
        """Pass the end on."""
        for observer in self._observers:
            observer.on_finish(progress)


class LoggingObserver(Observer):
    """Observer that logs notes as warnings of the logger phi3_lora; the default of the API."""

    def on_note(self, text: str) -> None:
        """Log the text."""
        logging.getLogger("phi3_lora").warning(text)
