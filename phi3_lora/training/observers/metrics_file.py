"""metrics.jsonl: one JSON object in each line; a resumed run cuts it back to its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_lora.storage.atomic import explained, replace_file
from phi3_lora.training.facts import RunStart
from phi3_lora.training.metrics import EvalMetrics, TrainMetrics
from phi3_lora.training.observer import Observer

FILE_NAME = "metrics.jsonl"


class MetricsFile(Observer):
    """Writer of the metrics.jsonl of a run."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE_NAME

    def on_start(self, start: RunStart) -> None:
        """Write the facts of the run.

        Raises:
            StorageError: when the line cannot be written.
        """
        self._append(start.to_dict())

    def on_metrics(self, metrics: TrainMetrics | EvalMetrics) -> None:
        """Write one record.

        Raises:
            StorageError: when the line cannot be written.
        """
        self._append(metrics.to_dict())

    def cut_back(self, step: int) -> None:
        """Delete the lines of later steps, and a last line that a crash cut off.

        Raises:
            StorageError: when the file cannot be written.
        """
        kept = [record for record in self._read() if record.get("step", 0) <= step]
        data = "".join(json.dumps(record) + "\n" for record in kept)
        replace_file(self.path, data.encode())

    def _append(self, record: Mapping[str, Any]) -> None:
        with explained(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        """Read every whole line."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step", 0), int):
                found.append(record)
        return found
