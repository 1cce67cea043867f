"""Running the program in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = [sys.executable, "-m", "phi3_lora_cli"]


def phi3_lora(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, check=False, **options
    )


def train_arguments(inputs: tuple[str, str], run: Path, backend: str) -> list[str]:
    """Sixty steps with a checkpoint every five."""
    model, data = inputs
    return [
        *("train", "--model", model, "--data", data, "--output", str(run)),
        *("--backend", backend, "--device", "cpu", "--max-steps", "60", "--lr", "1e-3"),
        *("--set", "training_config.save_steps=5", "--set", "training_config.logging_steps=3"),
    ]
