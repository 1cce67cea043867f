"""A run whose engine is open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phi3_lora.adapters.adapter import Adapter, with_spec
from phi3_lora.adapters.initialization import initial_weights
from phi3_lora.engine.protocol import Backend, Engine
from phi3_lora.engine.request import LoadRequest
from phi3_lora.inference.base_model import CheckedModel
from phi3_lora.training.environment import Environment
from phi3_lora.training.identity import RunIdentity
from phi3_lora.training.prepare import Prepared
from phi3_lora.training.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRun:
    """A run whose engine is open."""

    prepared: Prepared
    base: CheckedModel
    run_dir: Path
    engine: Engine
    identity: RunIdentity
    environment: Environment

    def plan_hash(self, progress: Progress) -> str:
        """Return the sha256 of the whole plan; for streamed data, of the steps so far."""
        position = progress.position
        return self.prepared.plan_hash if position is None else self.prepared.plan.hash(position)

    def read_adapter(self) -> Adapter:
        """Read the adapter from the engine."""
        return with_spec(
            self.engine.read_adapter(),
            self.prepared.lora,
            lora_dropout=self.prepared.lora.dropout,
            base_model=self.prepared.config.model,
            num_layers=self.prepared.base.config.num_hidden_layers,
        )

    def write_first_adapter(self) -> None:
        """Give the engine the adapter that the run starts from."""
        prepared = self.prepared
        if prepared.start is not None:
            self.engine.write_adapter(prepared.start.weights)
            return
        weights = initial_weights(
            prepared.lora,
            prepared.shapes,
            seed=prepared.config.training_config.seed,
            base=self.base.weight,
            init=prepared.config.peft_config.init_lora_weights or True,
        )
        self.engine.write_adapter(weights)


def open_engine(prepared: Prepared, base: CheckedModel, backend: Backend, device: str) -> Engine:
    """Open the engine of a run on a device."""
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
