"""Everything about a run that needs no weights: model shape, adapter, data, plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.fused import with_blocks
from phi3_lora.adapters.initialization import num_trained
from phi3_lora.adapters.targets import in_model_order
from phi3_lora.adapters.targets import resolve as resolve_lora
from phi3_lora.config.adapter import LoraConfig
from phi3_lora.config.schema import RunConfig
from phi3_lora.data.documents.selection import Dataset
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.errors import ConfigError
from phi3_lora.inference.base_model import FoundModel, find_base_model
from phi3_lora.inference.loading import with_adapter
from phi3_lora.models.family import recognise
from phi3_lora.models.weights import num_parameters
from phi3_lora.training.data import read_data
from phi3_lora.training.loop import Task
from phi3_lora.training.observer import Observer
from phi3_lora.training.plan.protocol import StepPlan


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything about a run that needs no weights."""

    config: RunConfig
    base: FoundModel
    lora: LoraSpec
    start: Adapter | None
    """The adapter to start from, if not from scratch."""
    valid: Dataset | None
    plan: StepPlan
    plan_hash: str

    @property
    def task(self) -> Task:
        """What the loop needs."""
        valid = self.valid.documents if self.valid else ()
        return Task(self.config.training_config, self.plan, valid)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of the layers to adapt."""
        available = self.base.config.adaptable_shapes()
        return {module: available[module] for module in self.lora.modules}

    def facts(self) -> dict[str, Any]:
        """The run's figures before it starts."""
        member = recognise(self.base.config)
        return {
            "model": self.config.model,
            "quantize": self.config.quantize,
            "family": member.hub_ids[0] if member else None,
            "num_parameters": num_parameters(self.base.config),
            "num_trainable_parameters": num_trained(
                self.lora, self.shapes, self.base.config.tensor_shapes()
            ),
            "num_modules": len(self.lora.modules) + len(self.lora.saved),
            "num_eval_documents": len(self.valid.documents) if self.valid else 0,
            "documents_per_step": self.config.training_config.documents_per_step,
            **self.plan.facts(),
            "plan_hash": self.plan_hash,
        }


def prepare(
    config: RunConfig,
    observer: Observer,
    start_dir: str | None = None,
    *,
    with_weights: bool = True,
) -> Prepared:
    """Read and check everything but the weights: model shape, adapter, data, plan.

    Args:
        config: the run.
        observer: where notes go.
        start_dir: the adapter that gives rank, alpha and targets; the default is config.adapter.
        with_weights: whether to download the weights of a hub id, too.

    Raises:
        Phi3LoraError: when any of it cannot be used.
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
    lora = _lora(config, base, start, observer)
    data = read_data(config, base, observer.note)
    return Prepared(config, base, lora, start, data.valid, data.plan, data.plan.hash())


def _lora(
    config: RunConfig, base: FoundModel, start: Adapter | None, observer: Observer
) -> LoraSpec:
    """What is trained: as configured, or as the adapter that the run starts from has it."""
    if start is not None:
        observer.note(f"rank, alpha and targets are those of {config.adapter}")
        own = {f.name: getattr(LoraConfig(), f.name) for f in dataclasses.fields(LoraConfig)}
        stray = [n for n, v in own.items() if getattr(config.peft_config, n) != v]
        stray = [f"peft_config.{name}" for name in stray if name != "lora_dropout"]
        if stray:
            observer.note(f"{', '.join(stray)} has no effect: the adapter brings its own")
        for note in start.notes:
            observer.note(note)
        # A given adapter brings its own shape; only dropout is the run's.
        spec = in_model_order(start.spec, base.config)
        spec = with_blocks(spec, start.weights, base.config)
        return dataclasses.replace(spec, dropout=config.peft_config.lora_dropout)
    lora, notes = resolve_lora(config.peft_config, base.config)
    for note in notes:
        observer.note(note)
    from_weights = config.peft_config.init_lora_weights is not True
    if base.backend_quantization != "none" and (lora.use_dora or lora.saved or from_weights):
        raise ConfigError(
            f"--quantize {base.backend_quantization}: DoRA, modules_to_save, pissa and olora start "
            "from the base's weights, which only the backend sees there; use --quantize 4bit or "
            "8bit"
        )
    return lora
