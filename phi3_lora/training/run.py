"""A training run from its configuration to its run folder."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lora.adapters.adapter import Adapter, with_spec
from phi3_lora.adapters.compress import settled
from phi3_lora.adapters.deltas import changes_nothing
from phi3_lora.adapters.fingerprint import encode_fingerprint
from phi3_lora.adapters.formats.folder import FINGERPRINT_NAME, TEMPLATE_NAME, write_adapter_folder
from phi3_lora.adapters.initialization import initial_weights
from phi3_lora.config.load import resolve
from phi3_lora.config.schema import RunConfig
from phi3_lora.data.documents.batch import documents_digest
from phi3_lora.engine.protocol import Backend, Engine
from phi3_lora.engine.registry import choose_backend
from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import DataError, TrainingError, TrainingInterrupted
from phi3_lora.inference.base_model import CheckedModel
from phi3_lora.inference.evaluation import Evaluation
from phi3_lora.inference.loading import check_for_backend, other_base_notes
from phi3_lora.training import resume as resuming
from phi3_lora.training.checkpoint import Checkpoint, CheckpointFolder
from phi3_lora.training.loop import Hooks, Progress, fit
from phi3_lora.training.metrics import MetricsFile
from phi3_lora.training.model_card import model_card
from phi3_lora.training.observer import Observer, SilentObserver
from phi3_lora.training.prepare import Prepared, prepare
from phi3_lora.training.rundir import check_same_run, locked, read_config, write_config
from phi3_lora.training.signals import stop_on_signal
from phi3_lora.verification.fingerprint import probe_batch, take_fingerprint


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves behind."""

    adapter: str
    """Folder of the trained adapter."""
    steps: int
    final_loss: float | None
    best_eval_loss: float | None
    plan_hash: str
    tokens_per_second: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return dataclasses.asdict(self)


def train(
    config: RunConfig, *, resume: bool = False, observer: Observer | None = None
) -> TrainResult:
    """Fine-tune and write the run folder.

    Args:
        config: the run; with resume, settings that may not change must equal the stored ones.
        resume: go on from the newest whole checkpoint in config.output_dir.
        observer: where progress and notes go; the default is silent.

    Raises:
        Phi3LoraError: with what is wrong and what to do.
    """
    observer = observer or SilentObserver()
    run_dir = Path(config.output_dir)
    with locked(run_dir, resume=resume):
        if resume:
            stored = resolve({**read_config(run_dir), "output_dir": config.output_dir}).config
            check_same_run(stored, config)
        # Before anything is downloaded or read.
        backend, device, note = choose_backend(config.backend, config.device)
        if note:
            observer.note(note)
        checkpoint = _find_checkpoint(run_dir, observer) if resume else None
        # A checkpoint is an adapter itself: what the run started from may be gone by now.
        prepared = prepare(
            config, observer, str(checkpoint.path) if checkpoint and config.adapter else None
        )
        base = check_for_backend(prepared.base, backend, observer.note)
        belongings = _belongings(prepared, base.identity)
        start = prepared.start if checkpoint is None else None
        for text in other_base_notes(start, base.identity):
            observer.note(text)
        if checkpoint is not None:
            resuming.check_belongs(checkpoint, belongings)
        engine = _open(prepared, base, backend, device)
        try:
            environment = resuming.environment(engine, backend)
            run = _Run(prepared, base, run_dir, engine, belongings, environment, observer)
            return run.train(checkpoint)
        finally:
            engine.close()


def _find_checkpoint(run_dir: Path, observer: Observer) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones are named."""
    checkpoint, problems = CheckpointFolder(run_dir, keep=0).newest_whole()
    for problem in problems:
        observer.note(f"skipped a damaged checkpoint: {problem}")
    if checkpoint is None:
        observer.note("no checkpoint yet: starting from step 0")
    return checkpoint


def _open(prepared: Prepared, base: CheckedModel, backend: Backend, device: str) -> Engine:
    config = prepared.config
    training = config.training_config
    return backend.open(
        LoadRequest(
            model=base.files,
            dtype=config.dtype,
            gpu_dtype="bfloat16" if training.bf16 else "float16" if training.fp16 else None,
            device=device,
            quantize=prepared.base.backend_quantization,
            lora=prepared.lora,
            optim=training.optim_spec,
            seed=training.seed,
            micro_batch_tokens=training.per_device_train_batch_size * training.max_length,
            gradient_checkpointing=training.gradient_checkpointing,
            compile=training.torch_compile,
        )
    )


def _belongings(prepared: Prepared, identity: str) -> dict[str, str]:
    """What must be the same for a checkpoint to be of this run."""
    lora = prepared.lora
    return {
        "model_identity": identity,
        "plan_hash": prepared.plan_hash,
        "valid_hash": documents_digest(prepared.task.eval_documents),
        "lora": f"{len(lora.modules)} modules of rank "
        f"{', '.join(map(str, sorted({layer.r for layer in lora.layers.values()})))} and "
        f"{len(lora.saved)} whole weights "
        f"(crc {zlib.crc32(repr(lora).encode()):08x})",
    }


class _Run:
    """A run while it trains: the engine and the files it leaves."""

    def __init__(
        self,
        prepared: Prepared,
        base: CheckedModel,
        run_dir: Path,
        engine: Engine,
        belongings: dict[str, str],
        environment: dict[str, Any],
        observer: Observer,
    ) -> None:
        self.prepared = prepared
        self.base = base
        self.run_dir = run_dir
        self.engine = engine
        self.belongings = belongings
        self.environment = environment
        self.observer = observer
        self.metrics = MetricsFile(run_dir)
        keep = prepared.config.training_config.save_total_limit
        self.checkpoints = CheckpointFolder(run_dir, keep=keep)

    def train(self, checkpoint: Checkpoint | None) -> TrainResult:
        """Run the loop and write the final adapter."""
        prepared, observer, engine = self.prepared, self.observer, self.engine
        write_config(self.run_dir, prepared.config)
        progress = self._restore(checkpoint)
        for note in engine.notes:
            observer.note(note)
        if progress.step == prepared.plan.total_steps:
            observer.note(f"this run is finished: all {progress.step:,} steps are done")
        event = "start" if checkpoint is None else "resume"
        padding = prepared.plan.first_steps.padding(engine.computed_tokens)
        facts = {**prepared.facts(), "padding": padding}
        self.metrics.append(
            {"event": event, **self.environment}
            | {"model_identity": self.belongings["model_identity"], **facts}
            | {"step": progress.step}
        )
        observer.start({**facts, **self.environment}, progress.step)
        hooks = Hooks(
            on_step=observer.step,
            on_metrics=self._log,
            on_checkpoint=self._save_checkpoint,
            on_best=lambda p, e: self._save_adapter("best", p, e),
        )
        with stop_on_signal() as stop:
            try:
                fit(engine, prepared.task, hooks, progress, stop)
            except (TrainingError, DataError) as cause:
                raise type(cause)(f"{cause}\n{self._last_good()}") from cause
        for text in prepared.plan.notes(progress.position):
            observer.note(text)
        if stop and progress.step < prepared.plan.total_steps:
            saved = ", saved" if progress.step else ""
            raise TrainingInterrupted(
                f"stopped at step {progress.step} of {prepared.plan.total_steps}{saved}; go on "
                f"with: phi3-lora train --resume --output {self.run_dir}",
                stop.exit_code,
            )
        self._save_adapter("adapter", progress, None)
        observer.finish()
        if changes_nothing(self._adapter()):
            observer.note(
                "the adapter changes nothing: every B is still 0 (a run of one step has only its "
                "warm-up, of rate 0); set training_config.warmup_ratio=0 or train longer"
            )
        return TrainResult(
            adapter=str(self.run_dir / "adapter"),
            steps=progress.step,
            final_loss=progress.last_loss,
            best_eval_loss=progress.best_eval_loss,
            plan_hash=self._plan_hash(progress),
            tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
            peak_memory_bytes=engine.peak_memory_bytes(),
        )

    def _plan_hash(self, progress: Progress) -> str:
        """Of the whole plan; where data streams, of the steps so far."""
        plan, position = self.prepared.plan, progress.position
        return self.prepared.plan_hash if position is None else plan.hash(position)

    def _restore(self, checkpoint: Checkpoint | None) -> Progress:
        prepared, engine = self.prepared, self.engine
        if checkpoint is not None:
            engine.write_adapter(checkpoint.weights)
            engine.write_optimizer(checkpoint.optimizer)
            self.metrics.cut_back(checkpoint.step)
            self.checkpoints.drop_after(checkpoint.step)
            changed = resuming.changed_environment(checkpoint, self.environment)
            if changed:
                self.observer.note(
                    "resuming elsewhere, so not bit for bit the same run: " + "; ".join(changed)
                )
            return Progress.from_dict(checkpoint.state)
        self.metrics.cut_back(-1)
        seed = prepared.config.training_config.seed
        start = prepared.start
        if start is not None:
            engine.write_adapter(start.weights)
            return Progress()
        weights = initial_weights(
            prepared.lora,
            prepared.shapes,
            seed=seed,
            base=self.base.weight,
            init=prepared.config.peft_config.init_lora_weights or True,
        )
        engine.write_adapter(weights)
        return Progress()

    def _log(self, record: dict[str, Any]) -> None:
        self.metrics.append(record)
        self.observer.metrics(record)

    def _adapter(self) -> Adapter:
        return with_spec(
            self.engine.read_adapter(),
            self.prepared.lora,
            lora_dropout=self.prepared.lora.dropout,
            base_model=self.prepared.config.model,
            num_layers=self.prepared.base.config.num_hidden_layers,
        )

    def _save_checkpoint(self, progress: Progress) -> None:
        state = {**progress.to_dict(), **self.belongings, "environment": self.environment}
        path = self.checkpoints.save(self._adapter(), self.engine.read_optimizer(), state)
        self.observer.saved(path)

    def _save_adapter(self, name: str, progress: Progress, evaluation: Evaluation | None) -> None:
        prepared = self.prepared
        adapter = settled(self._adapter(), prepared.lora)
        identity = self.belongings["model_identity"]
        card = model_card(
            adapter,
            prepared.config,
            {**prepared.facts(), "plan_hash": self._plan_hash(progress)},
            identity,
            self.environment,
            self.base.files.config,
            progress,
            evaluation,
        )
        origin = {
            "backend": self.environment["backend"],
            "dtype": self.environment["dtype"],
            "model_identity": identity,
        }
        probes = probe_batch(prepared.base.tokenizer)
        fingerprint = encode_fingerprint(take_fingerprint(self.engine, probes, origin))
        files = {"README.md": card.encode(), FINGERPRINT_NAME: fingerprint}
        if prepared.base.tokenizer.has_own_template:
            files[TEMPLATE_NAME] = prepared.base.tokenizer.template.source.encode()
        for note in write_adapter_folder(self.run_dir / name, adapter, files=files):
            self.observer.note(note)

    def _last_good(self) -> str:
        names = self.checkpoints.names()
        return f"last good checkpoint: {names[0]}" if names else "no checkpoint was saved before"
