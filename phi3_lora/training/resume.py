"""What must be the same for a run to go on, and what is told when it is not."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

from phi3_lora.engine.protocol import Backend, Engine
from phi3_lora.errors import CheckpointError, listing
from phi3_lora.training.checkpoint import Checkpoint


def environment(engine: Engine, backend: Backend) -> dict[str, Any]:
    """What a run's bits depend on besides its settings."""
    described = backend.describe().to_dict()
    return {
        "backend": backend.name,
        "device": engine.device_name,
        "dtype": engine.dtype,
        "world_size": engine.world_size,
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "versions": {
            "phi3-lora": version("phi3-lora"),
            "python": platform.python_version(),
            "numpy": version("numpy"),
            **described["versions"],
        },
        **{k: v for k, v in described.items() if k in ("num_threads", "blas")},
    }


_BELONGS = {
    "model_identity": "model: its config or weights are not those that the run began with",
    "plan_hash": "data: the rows (or the tokenizer) are not those that the run began with, so its "
    "steps would hold other documents",
    "valid_hash": "data.valid: the rows to validate on are not those that the run began with",
    "lora": "peft_config or --adapter: the run has {before}, now {now}",
}
"""Key of a checkpoint's state -> what to say where it differs."""


def check_belongs(checkpoint: Checkpoint, now: dict[str, str]) -> None:
    """Check that a checkpoint was made with this model, this data and this shape of adapter.

    Raises:
        CheckpointError: with what differs.
    """
    before = checkpoint.state
    problems = [
        text.format(before=before.get(key), now=now[key])
        for key, text in _BELONGS.items()
        if before.get(key) != now[key]
    ]
    if problems:
        problems.append("to train on with other data, start a new run with --adapter")
        raise CheckpointError(listing(f"cannot resume from {checkpoint.path}:", problems))


def changed_environment(checkpoint: Checkpoint, now: dict[str, Any]) -> list[str]:
    """What differs from where the checkpoint was written, one phrase each."""
    before = checkpoint.state.get("environment", {})
    changes = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict):
            old = old if isinstance(old, dict) else {}
            changes += [
                f"{key} was {old.get(key)}, now {value.get(key)}"
                for key in sorted({*old, *value})
                if old.get(key) != value.get(key)
            ]
        elif old != value:
            changes.append(f"{name} was {old}, now {value}")
    return changes
