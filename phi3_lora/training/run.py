"""A training run from its configuration to its run folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lora.adapters.deltas import changes_nothing
from phi3_lora.config.load import resolve
from phi3_lora.config.schema import RunConfig
from phi3_lora.engine.registry import choose_backend
from phi3_lora.errors import DataError, TrainingError, TrainingInterrupted
from phi3_lora.inference.loading import check_for_backend, other_base_notes
from phi3_lora.training.checkpoint import Checkpoint, CheckpointFolder
from phi3_lora.training.data import NO_PASSED_ROWS, PassedRows
from phi3_lora.training.environment import read_environment
from phi3_lora.training.facts import RunStart
from phi3_lora.training.loop import fit
from phi3_lora.training.observer import Observer, Observers
from phi3_lora.training.observers.adapters import FINAL_NAME, AdapterWriter
from phi3_lora.training.observers.checkpoints import CheckpointWriter
from phi3_lora.training.observers.metrics_file import MetricsFile
from phi3_lora.training.open_run import OpenRun, open_engine
from phi3_lora.training.prepare import prepare
from phi3_lora.training.progress import Progress
from phi3_lora.training.resume import check_belongs, find_checkpoint, restore
from phi3_lora.training.rundir import check_same_run, locked, read_config, write_config
from phi3_lora.training.signals import StopRequest, stop_on_signal


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a finished run."""

    adapter: str
    """Folder of the trained adapter."""
    steps: int
    final_loss: float | None
    """Training loss of the last line of metrics, in nats per supervised token."""
    best_eval_loss: float | None
    """Nats per supervised token."""
    plan_hash: str
    """sha256 of the plan."""
    tokens_per_second: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return dataclasses.asdict(self)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    rows: PassedRows = NO_PASSED_ROWS,
) -> TrainResult:
    """Fine-tune a model and write the run folder.

    Args:
        config: the run. With resume, settings that must not change must equal the stored ones.
        resume: continue from the newest whole checkpoint in config.output_dir.
        observer: receives the events of the run; None ignores them.
        rows: rows in memory, used in place of those that the configuration names.

    Raises:
        Phi3LoraError: with the problem and what to do.
    """
    observer = observer or Observers()
    run_dir = Path(config.output_dir)
    with locked(run_dir, resume=resume):
        if resume:
            stored = resolve({**read_config(run_dir), "output_dir": config.output_dir}).config
            check_same_run(stored, config)
        # Check the backend before anything is downloaded or read.
        backend, device, note = choose_backend(config.backend, config.device)
        if note:
            observer.on_note(note)
        checkpoint = find_checkpoint(run_dir, observer.on_note) if resume else None
        # A checkpoint is an adapter too. The adapter that the run started from may be gone.
        start_dir = str(checkpoint.path) if checkpoint and config.adapter else None
        prepared = prepare(config, observer.on_note, start_dir, rows=rows)
        base = check_for_backend(prepared.base, backend, observer.on_note)
        identity = prepared.identity(base.identity)
        start = prepared.start if checkpoint is None else None
        for text in other_base_notes(start, base.identity):
            observer.on_note(text)
        if checkpoint is not None:
            check_belongs(checkpoint, identity)
        engine = open_engine(prepared, base, backend, device)
        try:
            run = OpenRun(
                prepared=prepared,
                base=base,
                run_dir=run_dir,
                engine=engine,
                identity=identity,
                environment=read_environment(engine, backend),
            )
            return _train(run, checkpoint, observer)
        finally:
            engine.close()


def _train(run: OpenRun, checkpoint: Checkpoint | None, observer: Observer) -> TrainResult:
    """Take the steps of an open run and write its files.

    Args:
        run: the run.
        checkpoint: the checkpoint to resume from; None starts at step 0.
        observer: the caller's.
    """
    config = run.prepared.config
    metrics = MetricsFile(run.run_dir)
    checkpoints = CheckpointFolder(run.run_dir, keep=config.training_config.save_total_limit)
    listeners = Observers(metrics, AdapterWriter(run, observer.on_note), observer)
    # Every other observer receives on_checkpoint_due before the checkpoint is saved.
    observers = Observers(listeners, CheckpointWriter(run, checkpoints, listeners))

    write_config(run.run_dir, config)
    if checkpoint is None:
        metrics.cut_back(-1)
        run.write_first_adapter()
        progress = Progress()
    else:
        progress = restore(run, checkpoint, observer.on_note)
        metrics.cut_back(checkpoint.step)
        checkpoints.drop_after(checkpoint.step)
    _announce(run, progress, observers, is_resumed=checkpoint is not None)
    with stop_on_signal() as stop:
        try:
            fit(run.engine, run.prepared.task, observers, progress, stop)
        except (TrainingError, DataError) as cause:
            raise type(cause)(f"{cause}\n{_last_good(checkpoints)}") from cause
    for text in run.prepared.plan.notes(progress.position):
        observer.on_note(text)
    _check_finished(run, progress, stop)
    observers.on_finish(progress)
    if changes_nothing(run.read_adapter()):
        observer.on_note(
            "the adapter changes nothing: every B is still 0 (a run of one step has only its "
            "warm-up, of rate 0); set training_config.warmup_ratio=0 or train longer"
        )
    return _result(run, progress)


def _announce(run: OpenRun, progress: Progress, observers: Observer, *, is_resumed: bool) -> None:
    """Report the start of the run."""
    plan = run.prepared.plan
    for note in run.engine.notes:
        observers.on_note(note)
    if progress.step == plan.total_steps:
        observers.on_note(f"this run is finished: all {progress.step:,} steps are done")
    observers.on_start(
        RunStart(
            facts=run.prepared.facts(),
            environment=run.environment,
            identity=run.identity,
            padding=plan.first_steps.padding(run.engine.computed_tokens),
            step=progress.step,
            is_resumed=is_resumed,
        )
    )


def _check_finished(run: OpenRun, progress: Progress, stop: StopRequest) -> None:
    """Check that no signal stopped the run before its last step.

    Raises:
        TrainingInterrupted: with the command that resumes the run.
    """
    total_steps = run.prepared.plan.total_steps
    if stop and progress.step < total_steps:
        saved = ", saved" if progress.step else ""
        raise TrainingInterrupted(
            f"stopped at step {progress.step} of {total_steps}{saved}; resume "
            f"with: phi3-lora train --resume --output {run.run_dir}",
            stop.exit_code,
        )


def _last_good(checkpoints: CheckpointFolder) -> str:
    names = checkpoints.names()
    return f"last good checkpoint: {names[0]}" if names else "no checkpoint was saved before"


def _result(run: OpenRun, progress: Progress) -> TrainResult:
    return TrainResult(
        adapter=str(run.run_dir / FINAL_NAME),
        steps=progress.step,
        final_loss=progress.last_loss,
        best_eval_loss=progress.best_eval_loss,
        plan_hash=run.plan_hash(progress),
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        peak_memory_bytes=run.engine.peak_memory_bytes(),
    )
