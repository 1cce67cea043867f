"""The observer that saves the best and the final adapter."""

from __future__ import annotations

from collections.abc import Callable

from phi3_lora.adapters.compress import drop_initial_factors
from phi3_lora.adapters.fingerprint import FINGERPRINT_NAME, encode_fingerprint
from phi3_lora.adapters.formats.folder import TEMPLATE_NAME, write_adapter_folder
from phi3_lora.inference.evaluation import Evaluation
from phi3_lora.training.model_card import model_card
from phi3_lora.training.observer import Observer
from phi3_lora.training.open_run import OpenRun
from phi3_lora.training.progress import Progress
from phi3_lora.verification.fingerprint import probe_batch, take_fingerprint

BEST_NAME = "best"
FINAL_NAME = "adapter"


class AdapterWriter(Observer):
    """Writer of the adapter folders of a run."""

    def __init__(self, run: OpenRun, note: Callable[[str], None]) -> None:
        """Prepare to save.

        Args:
            run: the run.
            note: receives texts that the user should see.
        """
        self._run = run
        self._note = note

    def on_best(self, progress: Progress, evaluation: Evaluation) -> None:
        """Save the adapter with the lowest validation loss so far.

        Raises:
            StorageError: when the adapter cannot be written.
        """
        self._save(BEST_NAME, progress, evaluation)

    def on_finish(self, progress: Progress) -> None:
        """Save the final adapter.

        Raises:
            StorageError: when the adapter cannot be written.
        """
        self._save(FINAL_NAME, progress, None)

    def _save(self, name: str, progress: Progress, evaluation: Evaluation | None) -> None:
        run = self._run
        adapter = drop_initial_factors(run.read_adapter(), run.prepared.lora)
        card = model_card(run, adapter, progress, evaluation)
        files = {"README.md": card.encode(), FINGERPRINT_NAME: self._fingerprint()}
        tokenizer = run.prepared.base.tokenizer
        if tokenizer.has_own_template:
            files[TEMPLATE_NAME] = tokenizer.template.source.encode()
        for note in write_adapter_folder(run.run_dir / name, adapter, files=files):
            self._note(note)

    def _fingerprint(self) -> bytes:
        run = self._run
        origin = {
            "backend": run.environment.backend,
            "dtype": run.environment.dtype,
            "model_identity": run.identity.model_identity,
        }
        probes = probe_batch(run.prepared.base.tokenizer)
        return encode_fingerprint(take_fingerprint(run.engine, probes, origin))
