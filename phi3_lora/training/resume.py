"""The checkpoint that a run resumes from, and the checks that it belongs to the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from phi3_lora.errors import CheckpointError, listing
from phi3_lora.training.checkpoint import Checkpoint, CheckpointFolder
from phi3_lora.training.environment import Environment
from phi3_lora.training.identity import RunIdentity
from phi3_lora.training.open_run import OpenRun
from phi3_lora.training.progress import Progress

_BELONGS = {
    "model_identity": "model: its config or weights are not those that the run began with",
    "plan_hash": "data: the rows (or the tokenizer) are not those that the run began with, so its "
    "steps would hold other documents",
    "valid_hash": "data.valid: the rows to validate on are not those that the run began with",
    "lora": "peft_config or --adapter: the run has {before}, now {now}",
}
"""Field of a RunIdentity -> the problem where it differs."""


def find_checkpoint(run_dir: Path, note: Callable[[str], None]) -> Checkpoint | None:
    """Find the newest whole checkpoint of a run.

    Args:
        run_dir: the run folder.
        note: receives a text on each damaged checkpoint.

    Raises:
        CheckpointError: when there are checkpoints, but none is whole.
    """
    checkpoint, problems = CheckpointFolder(run_dir, keep=0).newest_whole()
    for problem in problems:
        note(f"skipped a damaged checkpoint: {problem}")
    if checkpoint is None:
        note("no checkpoint yet: starting from step 0")
    return checkpoint


def check_belongs(checkpoint: Checkpoint, identity: RunIdentity) -> None:
    """Check that a checkpoint was made with this model, this data and this shape of adapter.

    Raises:
        CheckpointError: with each difference.
    """
    before, now = RunIdentity.from_dict(checkpoint.state).to_dict(), identity.to_dict()
    problems = [
        text.format(before=before[name], now=now[name])
        for name, text in _BELONGS.items()
        if before[name] != now[name]
    ]
    if problems:
        problems.append("to train on with other data, start a new run with --adapter")
        raise CheckpointError(listing(f"cannot resume from {checkpoint.path}:", problems))


def restore(run: OpenRun, checkpoint: Checkpoint, note: Callable[[str], None]) -> Progress:
    """Bring an open run to the step of a checkpoint that belongs to it.

    Args:
        run: the run.
        checkpoint: its checkpoint.
        note: receives a text where the environment differs.

    Raises:
        CheckpointError: when the position in the data is damaged.
    """
    run.engine.write_adapter(checkpoint.weights)
    run.engine.write_optimizer(checkpoint.optimizer)
    before = Environment.from_dict(checkpoint.state.get("environment", {}))
    changes = run.environment.changes_since(before)
    if changes:
        note("resuming elsewhere, so not bit for bit the same run: " + "; ".join(changes))
    return Progress.from_dict(checkpoint.state)
