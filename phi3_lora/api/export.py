"""Base models written anew: merged with adapters, or quantised."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phi3_lora.adapters.adapter import adapter_problems
from phi3_lora.adapters.deltas import Weighted, concatenated
from phi3_lora.adapters.formats.folder import check_apart, check_unused, write_adapter_folder
from phi3_lora.api.options import AnyPath, Note, OptionError, folder_of, log_note
from phi3_lora.config.schema import DtypeOption
from phi3_lora.errors import AdapterError, ModelError, listing
from phi3_lora.export import merge as merging
from phi3_lora.export.gguf_model import OUT_TYPES
from phi3_lora.hub.download import resolve_adapter_dir, resolve_model_dir
from phi3_lora.inference.base_model import FoundModel, find_base_model
from phi3_lora.inference.loading import check_base_model, load_adapter, other_base_notes
from phi3_lora.models.quantization.folder import write_quantized_folder
from phi3_lora.models.weights import check_model_files
from phi3_lora.storage.atomic import check_folder_unused

MergeTarget = Literal["hf", "mlx", "gguf", "adapter"]
OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
_WELL_KEPT = 0.95
"""Cosine between a delta and what the result holds of it, below which a note is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """Form of a merged model."""

    to: MergeTarget = "hf"
    dtype: DtypeOption = "auto"
    outtype: OutType = "auto"
    dequantize: bool = False

    def __post_init__(self) -> None:
        is_plain = self.dtype == self.outtype == "auto" and not self.dequantize
        if self.to == "adapter" and not is_plain:
            raise OptionError("--dtype, --outtype and --dequantize are of models: leave them out")
        if self.to == "gguf" and self.dtype != "auto":
            raise OptionError("--dtype is of model folders: with --to gguf use --outtype")
        if self.to != "gguf" and self.outtype != "auto":
            raise OptionError(f"--outtype is of GGUF files: with --to {self.to} use --dtype")


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A base model with adapters folded into it."""

    merge: merging.Merge

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        merge = self.merge
        survival = {
            module: {"cosine": kept.cosine, "norm_ratio": kept.norm_ratio}
            for module, kept in merge.survival.items()
        }
        return {
            "path": merge.path,
            "dtype": merge.dtype,
            "notes": merge.notes,
            "survival": survival,
        }


@dataclass(frozen=True, slots=True)
class AdapterSum:
    """Several adapters written as one."""

    path: str
    num_adapters: int
    num_modules: int
    ranks: list[int]
    """Different ranks of its modules, ascending."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {"path": self.path, "modules": self.num_modules, "ranks": self.ranks}


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """A base model in 4 or 8 bits."""

    path: str
    bits: int
    error: float
    """Mean relative error of the weights."""
    worst_error: float
    worst_module: str

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            "path": self.path,
            "bits": self.bits,
            "error": self.error,
            "worst_error": self.worst_error,
            "worst_module": self.worst_module,
        }


def merge(
    model: str,
    adapter: AnyPath | Sequence[AnyPath],
    output: AnyPath,
    *,
    weight: float | Sequence[float] = (),
    to: MergeTarget = "hf",
    dtype: DtypeOption = "auto",
    outtype: OutType = "auto",
    dequantize: bool = False,
    revision: str | None = None,
    note: Note = log_note,
) -> MergeResult | AdapterSum:
    """Fold adapters into the base model, or write several adapters as one.

    Args:
        model: the base model: a folder, a hub id, or demo.
        adapter: a folder or hub id, or several, which are added up.
        output: a new folder.
        weight: factor of each adapter, in the same order; the default is 1 for each.
        to: hf or mlx (one folder for both), gguf (one file for llama.cpp), or adapter (no base:
            the sum of the adapters as one adapter).
        dtype: of the result; auto is the base's own.
        outtype: of a GGUF file; auto is the base's own.
        dequantize: write a base of 4 or 8 bits in full.
        revision: branch, tag or commit of a hub id.
        note: called with what the user should know; the default logs a warning.

    Raises:
        OptionError: when options do not go together.
        AdapterError: when an adapter does not fit, or output is in use.
        ModelError: when the base model cannot be used.
    """
    options = MergeOptions(to=to, dtype=dtype, outtype=outtype, dequantize=dequantize)
    adapters = [adapter] if isinstance(adapter, (str, os.PathLike)) else list(adapter)
    weights = _weights(weight, len(adapters))
    folders = [str(resolve_adapter_dir(str(path))) for path in adapters]
    base = find_base_model(model, revision, with_weights=to != "adapter")
    if dequantize and base.config.quantization is None:
        raise OptionError(f"--dequantize has no effect: {model} is not quantised")
    target = folder_of(output)
    check_apart(target, base.path, *map(Path, folders))
    parts = []
    for path, factor in zip(folders, weights, strict=True):
        loaded = load_adapter(path, base)
        base = base.with_adapter_template(loaded.template)
        parts.append(Weighted(loaded.adapter, factor))
    if to == "adapter":
        return _write_sum(parts, target, note)
    return MergeResult(_write_model(base, parts, target, options, note))


def _weights(weight: float | Sequence[float], num_adapters: int) -> list[float]:
    """A factor for each adapter."""
    weights = [float(weight)] if isinstance(weight, (int, float)) else list(weight)
    if not all(map(math.isfinite, weights)):
        raise OptionError(f"--weight must be a number, got {', '.join(map(str, weights))}")
    if weights and len(weights) != num_adapters:
        raise OptionError(
            f"{num_adapters} --adapter and {len(weights)} --weight: give each adapter one, or none"
        )
    return weights or [1.0] * num_adapters


def _write_sum(parts: Sequence[Weighted], target: Path, note: Note) -> AdapterSum:
    check_unused(target)
    adapter = concatenated(parts)
    problems = adapter_problems(adapter)
    if problems:
        raise AdapterError(listing("the sum cannot be written; choose another --weight:", problems))
    for text in write_adapter_folder(target, adapter):
        note(text)
    ranks = sorted({adapter.rank(module) for module in adapter.modules})
    return AdapterSum(str(target), len(parts), len(adapter.modules), ranks)


def _write_model(
    base: FoundModel, parts: Sequence[Weighted], target: Path, options: MergeOptions, note: Note
) -> merging.Merge:
    checked = check_base_model(base)
    for text in {t for part in parts for t in other_base_notes(part.adapter, checked.identity)}:
        note(text)
    inputs = (base.path, base.config, checked.files.tensors, parts, target)
    if options.to == "gguf":
        chosen = None if options.outtype == "auto" else options.outtype
        result = merging.merge_to_gguf(*inputs, out_type=chosen, dequantized=options.dequantize)
    else:
        stored = None if options.dtype == "auto" else options.dtype
        result = merging.merge(*inputs, dtype=stored, dequantized=options.dequantize)
    for text in [*result.notes, *_survival_notes(result)]:
        note(text)
    return result


def _survival_notes(result: merging.Merge) -> list[str]:
    worst = result.worst_module
    if worst is None:
        return ["nothing is changed: every delta, times its --weight, is 0"]
    if result.survival[worst].cosine >= _WELL_KEPT:
        return []
    exact = "--outtype f32" if result.dtype in OUT_TYPES else "--dtype float32"
    return [
        f"{result.dtype} holds only part of the adapter (cosine "
        f"{result.survival[worst].cosine:.3f} in {worst}): merge with {exact}, or keep "
        "base and adapter apart"
    ]


def quantize(
    model: str,
    output: AnyPath,
    *,
    bits: Literal[4, 8] = 4,
    revision: str | None = None,
) -> QuantizeResult:
    """Write a base model in 4 or 8 bits, with equal weights on both backends.

    Args:
        model: a folder, a hub id, or demo.
        output: a new folder.
        bits: of each weight; 4 or 8.
        revision: branch, tag or commit of a hub id.

    Raises:
        OptionError: when bits is not 4 or 8.
        ModelError: when the model cannot be used, or output already holds something.
        StorageError: when the disk is full.
    """
    if bits not in (4, 8):
        raise OptionError(f"bits must be 4 or 8, got {bits!r}")
    target = folder_of(output)
    check_folder_unused(target, ModelError, "already holds something: choose another --output")
    source = check_model_files(resolve_model_dir(model, revision))
    error = write_quantized_folder(source.path, source.config, source.tensors, target, bits=bits)
    return QuantizeResult(str(target), bits, error.mean, error.worst, error.worst_module)
