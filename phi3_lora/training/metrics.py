"""metrics.jsonl: one JSON object a line, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi3_lora.storage.atomic import explained, replace_file

FILE_NAME = "metrics.jsonl"


@dataclass(slots=True)
class Window:
    """Sums since the last line, kept in checkpoints so that a resumed run logs the same."""

    nats: float = 0.0
    loss_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0

    def add(self, *, nats: float, loss_tokens: int, tokens: int, seconds: float) -> None:
        """Count one step."""
        self.nats += nats
        self.loss_tokens += loss_tokens
        self.tokens += tokens
        self.seconds += seconds
        self.steps += 1

    def line(
        self, *, step: int, epoch: float, grad_norm: float, lr: float, peak_memory_bytes: int
    ) -> dict[str, Any]:
        """The line of these sums; loss is the token-weighted mean."""
        return {
            "step": step,
            "epoch": round(epoch, 6),
            "loss": self.nats / self.loss_tokens,
            "grad_norm": grad_norm,
            "lr": lr,
            "loss_tokens": self.loss_tokens,
            "tokens": self.tokens,
            "step_seconds": self.seconds / self.steps,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "peak_memory_bytes": peak_memory_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return asdict(self)


class MetricsFile:
    """Appends to a run's metrics.jsonl."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE_NAME

    def append(self, record: dict[str, Any]) -> None:
        """Write one line.

        Raises:
            StorageError: when it cannot be written.
        """
        with explained(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def cut_back(self, step: int) -> None:
        """Drop every line after a step, and a last line that was cut off by a crash."""
        kept = [r for r in self.read() if r.get("step", 0) <= step]
        data = "".join(json.dumps(r) + "\n" for r in kept)
        replace_file(self.path, data.encode())

    def read(self) -> list[dict[str, Any]]:
        """Every whole line."""
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
