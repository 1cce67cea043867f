"""Errors that a user can cause or must act on; every other error is a bug of phi3-lora."""

from __future__ import annotations

from collections.abc import Sequence

MAX_SHOWN = 20
"""Most problems that one message lists; it counts the rest."""


class Phi3LoraError(Exception):
    """Base of every error that is shown to a user as a message, without a traceback."""

    exit_code = 2


class ConfigError(Phi3LoraError, ValueError):
    """A setting is unknown, malformed or out of range."""


class DataError(Phi3LoraError, ValueError):
    """A data file or a row in it cannot be used."""


class ModelError(Phi3LoraError, ValueError):
    """A base model folder cannot be used."""


class AdapterError(Phi3LoraError, ValueError):
    """An adapter cannot be read, or does not fit."""


class CheckpointError(Phi3LoraError, ValueError):
    """A checkpoint is damaged or belongs to another run."""


class RunFolderError(Phi3LoraError, ValueError):
    """The output folder cannot be used."""


class StorageError(Phi3LoraError, OSError):
    """The disk is full or a file cannot be written."""


class TrainingError(Phi3LoraError, RuntimeError):
    """Training stopped: a loss is not finite, or memory is full."""


class BackendUnavailableError(Phi3LoraError, RuntimeError):
    """A backend or the device it needs is missing on this machine."""


class TrainingInterrupted(Phi3LoraError):
    """A signal stopped training after a checkpoint was saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def listing(title: str, problems: Sequence[str], *, total: int | None = None) -> str:
    """Join problems in one message: a title, at most MAX_SHOWN problems, a count of the rest.

    Args:
        title: the first line.
        problems: all problems, or at least the first MAX_SHOWN.
        total: number of all problems; the default is the number in problems.
    """
    total = len(problems) if total is None else total
    lines = [title, *(f"  {problem}" for problem in problems[:MAX_SHOWN])]
    if total > MAX_SHOWN:
        lines.append(f"  ... and {total - MAX_SHOWN:,} more")
    return "\n".join(lines)
