"""Where a run tells what it does; the console and tests listen."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol


class Progressing(Protocol):
    """The part of the loop's progress that observers read."""

    step: int


class Observer(Protocol):
    """Told of each event of a run."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def start(self, facts: dict[str, Any], step: int) -> None:
        """Training begins after this step."""

    def step(self, progress: Progressing, loss: float) -> None:
        """A step is done."""

    def metrics(self, record: dict[str, Any]) -> None:
        """A line was added to metrics.jsonl."""

    def saved(self, path: Path) -> None:
        """A checkpoint was written."""

    def finish(self) -> None:
        """The run is done."""


class SilentObserver:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Ignore."""

    def start(self, facts: dict[str, Any], step: int) -> None:
        """Ignore."""

    def step(self, progress: Progressing, loss: float) -> None:
        """Ignore."""

    def metrics(self, record: dict[str, Any]) -> None:
        """Ignore."""

    def saved(self, path: Path) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""


class LoggingObserver(SilentObserver):
    """Logs notes as warnings of the logger phi3_lora; what a program that trains gets."""

    def note(self, text: str) -> None:
        """Log it."""
        logging.getLogger("phi3_lora").warning(text)
