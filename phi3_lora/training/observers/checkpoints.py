"""The observer that saves checkpoints."""

from __future__ import annotations

from phi3_lora.training.checkpoint import CheckpointFolder
from phi3_lora.training.observer import Observer
from phi3_lora.training.open_run import OpenRun
from phi3_lora.training.progress import Progress


class CheckpointWriter(Observer):
    """Writer of the checkpoints of a run."""

    def __init__(self, run: OpenRun, folder: CheckpointFolder, listener: Observer) -> None:
        """Prepare to save.

        Args:
            run: the run.
            folder: its checkpoints.
            listener: receives on_checkpoint after each save.
        """
        self._run = run
        self._folder = folder
        self._listener = listener

    def on_checkpoint_due(self, progress: Progress) -> None:
        """Save the adapter, the optimizer and the state of the run.

        Raises:
            StorageError: when the checkpoint cannot be written; the older ones stay.
        """
        state = {
            **progress.to_dict(),
            **self._run.identity.to_dict(),
            "environment": self._run.environment.to_dict(),
        }
        folder = self._folder.save(
            self._run.read_adapter(), self._run.engine.read_optimizer(), state
        )
        self._listener.on_checkpoint(folder)
