"""Merging adapters: into a model folder, into a GGUF file, or into one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from phi3_lora.adapters.checks import adapter_problems
from phi3_lora.adapters.deltas import Weighted, concatenated
from phi3_lora.adapters.formats.folder import check_unused, write_adapter_folder
from phi3_lora.errors import AdapterError, ConfigError, ModelError, listing
from phi3_lora.export.gguf_model import check_gguf, unchanged_as_stored
from phi3_lora.export.gguf_tensors import OUT_TYPE_OF, OUT_TYPES, as_q8_0
from phi3_lora.export.merged_tensors import MergedTensors, Survival
from phi3_lora.export.ollama import fill_gguf_folder
from phi3_lora.models.config import DTYPES, ModelConfig
from phi3_lora.models.writer import write_companions, write_shards
from phi3_lora.storage.atomic import replace_folder
from phi3_lora.storage.optional import gguf_package
from phi3_lora.storage.safetensors import STORED_AS, TensorInfo

MergeTarget = Literal["hf", "mlx", "gguf", "adapter"]
"""hf and mlx: one folder for both; gguf: one file for llama.cpp; adapter: one adapter, no base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """Settings of the result of a merge."""

    to: MergeTarget = "hf"
    dtype: str | None = None
    """float32, bfloat16 or float16 of a model folder; None keeps the base's."""
    out_type: str | None = None
    """Name in gguf_tensors.OUT_TYPES; None takes the type of the base's dtype."""
    dequantize: bool = False
    """Write a quantised base on a shared grid unquantised; without it the merge fails."""

    def __post_init__(self) -> None:
        """Make sure that each option has an effect.

        Raises:
            ConfigError: when an option belongs to another target.
        """
        if self.to == "adapter" and (self.dtype or self.out_type or self.dequantize):
            raise ConfigError("--dtype, --outtype and --dequantize apply only to models: omit them")
        if self.to == "gguf" and self.dtype is not None:
            raise ConfigError("--dtype applies only to model folders: with --to gguf use --outtype")
        if self.to != "gguf" and self.out_type is not None:
            raise ConfigError(f"--outtype applies only to gguf: with --to {self.to} use --dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """Inputs of a merge: the base model, the adapters and the place of the result."""

    source: Path
    """The base model's folder, with checked weights."""
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    """Tensors of source, by name; a merge to one adapter does not read them."""
    parts: Sequence[Weighted]
    """At least one adapter, each checked against source."""
    target: Path
    """A folder that does not exist or is empty."""
    options: MergeOptions = field(default_factory=MergeOptions)


@dataclass(frozen=True, slots=True)
class MergedModel:
    """A merge that wrote a model."""

    path: str
    dtype: str
    """Dtype of a model folder, or output type of a GGUF file."""
    survival: dict[str, Survival]
    """Survival by module path, for modules whose delta is not 0."""
    notes: list[str] = field(default_factory=list)
    """Differences between llama.cpp or Ollama and the model, one sentence each."""

    @property
    def worst_module(self) -> str | None:
        """The module with the smallest cosine."""
        return min(self.survival, key=lambda m: self.survival[m].cosine, default=None)

    @property
    def mean_cosine(self) -> float:
        """Mean cosine over the modules; 1 if there are no modules."""
        values = [s.cosine for s in self.survival.values()]
        return float(np.mean(values)) if values else 1.0

    @property
    def exact_option(self) -> str:
        """The command-line option that keeps the deltas more exactly."""
        return "--outtype f32" if self.dtype in OUT_TYPES else "--dtype float32"

    def to_dict(self) -> dict[str, Any]:
        """Return the values of --json."""
        return {
            "path": self.path,
            "dtype": self.dtype,
            "notes": self.notes,
            "survival": {module: asdict(kept) for module, kept in self.survival.items()},
        }


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """A merge that wrote one adapter."""

    path: str
    num_modules: int
    ranks: list[int]
    """Ranks of the modules, sorted, each once."""
    notes: list[str]
    """Notes on formats that were left out, with the reason."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values of --json."""
        return {"path": self.path, "modules": self.num_modules, "ranks": self.ranks}


MergeResult = MergedModel | MergedAdapter


def merge(request: MergeRequest) -> MergeResult:
    """Write the base with W + sum of weight * scale * B A in place of W, or the sum alone.

    Raises:
        AdapterError: when target is in use, or the sum cannot be written as an adapter.
        ModelError: when the base is quantised, a number is too large for the dtype, the package
            gguf is missing, or llama.cpp cannot hold the model.
        StorageError: when the disk is full; target stays unchanged.
    """
    check_unused(request.target)
    if request.options.to == "adapter":
        return _merge_to_adapter(request)
    _check_base(request)
    return _merge_to_gguf(request) if request.options.to == "gguf" else _merge_to_folder(request)


def _merge_to_adapter(request: MergeRequest) -> MergedAdapter:
    adapter = concatenated(request.parts)
    problems = adapter_problems(adapter)
    if problems:
        raise AdapterError(listing("the sum cannot be written; choose another --weight:", problems))
    notes = write_adapter_folder(request.target, adapter)
    ranks = sorted({adapter.rank(module) for module in adapter.modules})
    return MergedAdapter(str(request.target), len(adapter.modules), ranks, notes)


def _merge_to_folder(request: MergeRequest) -> MergedModel:
    chosen = request.options.dtype or request.config.dtype
    assert chosen in DTYPES
    merged = MergedTensors(request.config, request.tensors, request.parts, STORED_AS[chosen])
    changes: dict[str, Any] = {"dtype": chosen, "torch_dtype": chosen}
    changes |= dict.fromkeys(("quantization", "quantization_config"))

    def fill(folder: Path) -> None:
        write_companions(request.source, request.config, folder, changes)
        write_shards(folder, merged.tensors())

    replace_folder(request.target, fill)
    return MergedModel(str(request.target), chosen, merged.survival())


def _merge_to_gguf(request: MergeRequest) -> MergedModel:
    """Write model.gguf, for llama.cpp, with a Modelfile for Ollama."""
    source, config, tensors = request.source, request.config, request.tensors
    gguf_package(ModelError)
    check_gguf(source, config)
    chosen = request.options.out_type or OUT_TYPE_OF[config.dtype]
    rounding = as_q8_0 if chosen == "q8_0" else None
    stored_as = OUT_TYPES[chosen].stored_as
    merged = MergedTensors(config, tensors, request.parts, stored_as, rounding)
    notes: list[str] = []

    def fill(folder: Path) -> None:
        made = unchanged_as_stored(merged.tensors(), tensors, merged.changed)
        notes.extend(fill_gguf_folder(folder, source, config, made, out_type=chosen))

    replace_folder(request.target, fill)
    return MergedModel(str(request.target), chosen, merged.survival(), notes)


def _check_base(request: MergeRequest) -> None:
    source, config = request.source, request.config
    if config.quantization is None:
        return
    if config.grid_bits is None:
        raise ModelError(
            f"{source} is quantised in a way that only mlx-lm reads: merge into the model that it "
            "was made from"
        )
    if not request.options.dequantize:
        raise ModelError(
            f"{source} holds {config.grid_bits}-bit weights; on their grid most of an adapter is "
            "lost: add --dequantize to write the result in full, or keep base and adapter apart"
        )
