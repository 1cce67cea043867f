"""The preparation of a run: everything that needs no weights of the base model."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.fused import with_blocks
from phi3_lora.adapters.initialization import num_trained
from phi3_lora.adapters.targets import in_model_order
from phi3_lora.adapters.targets import resolve as resolve_lora
from phi3_lora.config.adapter import LoraConfig
from phi3_lora.config.schema import RunConfig
from phi3_lora.data.documents.batch import documents_digest
from phi3_lora.data.documents.selection import Dataset
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.errors import ConfigError
from phi3_lora.inference.base_model import FoundModel, find_base_model
from phi3_lora.inference.loading import with_adapter
from phi3_lora.models.family import recognise
from phi3_lora.models.weights import num_parameters
from phi3_lora.storage.cache import Note
from phi3_lora.training.data import NO_PASSED_ROWS, PassedRows, read_data
from phi3_lora.training.facts import RunFacts
from phi3_lora.training.identity import RunIdentity
from phi3_lora.training.loop import Task
from phi3_lora.training.plan.protocol import StepPlan


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is prepared but has no weights of the base model yet."""

    config: RunConfig
    base: FoundModel
    lora: LoraSpec
    start: Adapter | None
    """The adapter to start from; None starts with initial weights."""
    valid: Dataset | None
    plan: StepPlan
    plan_hash: str
    """sha256 of the plan; for streamed data, of the first block."""

    @property
    def task(self) -> Task:
        """The task of the training loop."""
        valid = self.valid.documents if self.valid else ()
        return Task(self.config.training_config, self.plan, valid)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of each layer to adapt."""
        available = self.base.config.adaptable_shapes()
        return {module: available[module] for module in self.lora.modules}

    def facts(self) -> RunFacts:
        """Return the figures of the run."""
        shape = self.base.config
        member = recognise(shape)
        return RunFacts(
            model=self.config.model,
            quantize=self.config.quantize,
            family=member.hub_ids[0] if member else None,
            num_parameters=num_parameters(shape),
            num_trainable_parameters=num_trained(self.lora, self.shapes, shape.tensor_shapes()),
            num_modules=len(self.lora.modules) + len(self.lora.saved),
            num_eval_documents=len(self.task.eval_documents),
            documents_per_step=self.config.training_config.documents_per_step,
            plan=self.plan.facts(),
            plan_hash=self.plan_hash,
        )

    def identity(self, model_identity: str) -> RunIdentity:
        """Take the identity of the run.

        Args:
            model_identity: sha256 of the base model's config and weights.
        """
        return RunIdentity(
            model_identity=model_identity,
            plan_hash=self.plan_hash,
            valid_hash=documents_digest(self.task.eval_documents),
            lora=_shape_text(self.lora),
        )


def _shape_text(lora: LoraSpec) -> str:
    ranks = ", ".join(map(str, sorted({layer.r for layer in lora.layers.values()})))
    return (
        f"{len(lora.modules)} modules of rank {ranks} and {len(lora.saved)} whole weights "
        f"(crc {zlib.crc32(repr(lora).encode()):08x})"
    )


def prepare(
    config: RunConfig,
    note: Note,
    start_dir: str | None = None,
    *,
    with_weights: bool = True,
    rows: PassedRows = NO_PASSED_ROWS,
) -> Prepared:
    """Read and check everything but the weights: model shape, adapter, data and plan.

    Args:
        config: the run.
        note: receives texts that the user should see.
        start_dir: folder of the adapter to start from; the default is config.adapter.
        with_weights: True also downloads the weights of a hub id.
        rows: rows in memory, used in place of those that the configuration names.

    Raises:
        Phi3LoraError: with the problem and what to do.
    """
    base = find_base_model(
        config.model,
        config.revision,
        quantize=config.quantize,
        with_weights=with_weights,
        chat_template=config.data.chat_template,
    )
    start_dir = start_dir or config.adapter
    base, start = with_adapter(base, start_dir)
    lora = _lora(config, base, start, note)
    data = read_data(config, base, note, rows)
    return Prepared(config, base, lora, start, data.valid, data.plan, data.plan.hash())


def _lora(config: RunConfig, base: FoundModel, start: Adapter | None, note: Note) -> LoraSpec:
    """Return the shape of the adapter: that of the start adapter, or else as configured."""
    if start is not None:
        note(f"rank, alpha and targets are those of {config.adapter}")
        own = {f.name: getattr(LoraConfig(), f.name) for f in dataclasses.fields(LoraConfig)}
        stray = [n for n, v in own.items() if getattr(config.peft_config, n) != v]
        stray = [f"peft_config.{name}" for name in stray if name != "lora_dropout"]
        if stray:
            note(f"{', '.join(stray)} has no effect: the adapter brings its own")
        for text in start.notes:
            note(text)
        # The shape is that of the adapter; only the dropout is a setting of the run.
        spec = in_model_order(start.spec, base.config)
        spec = with_blocks(spec, start.weights, base.config)
        return dataclasses.replace(spec, dropout=config.peft_config.lora_dropout)
    lora, notes = resolve_lora(config.peft_config, base.config)
    for text in notes:
        note(text)
    from_weights = config.peft_config.init_lora_weights is not True
    if base.backend_quantization != "none" and (lora.use_dora or lora.saved or from_weights):
        raise ConfigError(
            f"--quantize {base.backend_quantization}: DoRA, modules_to_save, pissa and olora start "
            "from the base's weights, which only the backend sees there; use --quantize 4bit or "
            "8bit"
        )
    return lora
