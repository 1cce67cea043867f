"""What must be the same for a run to go on, and what is told when it is not."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

from phi3_lora.backend import Backend, Engine
from phi3_lora.errors import CheckpointError, listing
from phi3_lora.training.checkpoint import Checkpoint


def environment(engine: Engine, backend: Backend) -> dict[str, Any]:
    """What a run's bits depend on besides its settings."""
    described = backend.describe()
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


def check_belongs(checkpoint: Checkpoint, identity: str, plan_hash: str) -> None:
    """Check that a checkpoint was made with this model and this data.

    Raises:
        CheckpointError: with what differs.
    """
    problems = []
    if checkpoint.state.get("model_identity") != identity:
        problems.append("model: its config or weights are not those that the run began with")
    if checkpoint.state.get("plan_hash") != plan_hash:
        problems.append(
            "data: the rows (or the tokenizer) are not those that the run began with, so its "
            "steps would hold other documents"
        )
    if problems:
        problems.append("to train on with other data, start a new run with --adapter")
        raise CheckpointError(listing(f"cannot resume from {checkpoint.path}:", problems))


def changed_environment(checkpoint: Checkpoint, now: dict[str, Any]) -> list[str]:
    """What differs from where the checkpoint was written, one phrase each."""
    before = checkpoint.state.get("environment", {})
    return [
        f"{name} was {before.get(name)!r}, now {now[name]!r}"
        for name in now
        if before.get(name) != now[name]
    ]
