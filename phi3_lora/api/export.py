"""Functions that write new models: merge and quantize."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from phi3_lora.adapters.deltas import Weighted
from phi3_lora.adapters.formats.folder import check_apart
from phi3_lora.api.options import AnyPath, Note, OptionError, folder_of, log_note
from phi3_lora.config.schema import DtypeOption
from phi3_lora.errors import ConfigError
from phi3_lora.export.merge import MergedModel, MergeOptions, MergeRequest, MergeResult, MergeTarget
from phi3_lora.export.merge import merge as merge_adapters
from phi3_lora.hub.download import resolve_adapter_dir
from phi3_lora.inference.base_model import FoundModel, find_base_model
from phi3_lora.inference.loading import check_base_model, load_adapter, other_base_notes
from phi3_lora.inference.quantize import QuantizeResult
from phi3_lora.inference.quantize import quantize as quantize_base
from phi3_lora.storage.safetensors import TensorInfo

OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
_WELL_KEPT = 0.95
"""A note follows if the cosine between a delta and its part in the result is below this."""


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
) -> MergeResult:
    """Merge adapters into the base model, or write several adapters as one.

    Args:
        model: the base model: a folder, a hub id, or demo.
        adapter: a folder or hub id, or several, which are summed.
        output: a new folder.
        weight: a factor for each adapter, in the same order; the default is 1.
        to: hf or mlx (one folder for both), gguf (one file for llama.cpp), or adapter (the sum of
            the adapters as one adapter, without the base).
        dtype: dtype of the result; auto is the base's own.
        outtype: type of a GGUF file; auto is the base's own.
        dequantize: write a base of 4 or 8 bits without quantisation.
        revision: branch, tag or commit of a hub id.
        note: receives each text for the user; the default logs it as a warning.

    Raises:
        OptionError: when options do not go together.
        AdapterError: when an adapter does not fit, or output is in use.
        ModelError: when the base model cannot be used.
    """
    options = _options(to, dtype, outtype, dequantize=dequantize)
    adapters = [adapter] if isinstance(adapter, (str, os.PathLike)) else list(adapter)
    weights = _weights(weight, len(adapters))
    folders = [str(resolve_adapter_dir(str(path))) for path in adapters]
    base = find_base_model(model, revision, with_weights=to != "adapter")
    if dequantize and base.config.quantization is None:
        raise OptionError(f"--dequantize has no effect: {model} is not quantised")
    target = folder_of(output)
    check_apart(target, base.path, *map(Path, folders))
    base, parts = _load_parts(base, folders, weights)
    tensors: Mapping[str, TensorInfo] = {}
    if to != "adapter":
        checked = check_base_model(base)
        tensors = checked.files.tensors
        others = {t for part in parts for t in other_base_notes(part.adapter, checked.identity)}
        for text in others:
            note(text)
    result = merge_adapters(
        MergeRequest(
            source=base.path,
            config=base.config,
            tensors=tensors,
            parts=parts,
            target=target,
            options=options,
        )
    )
    lost = _survival_notes(result) if isinstance(result, MergedModel) else []
    for text in [*result.notes, *lost]:
        note(text)
    return result


def _load_parts(
    base: FoundModel, folders: Sequence[str], weights: Sequence[float]
) -> tuple[FoundModel, list[Weighted]]:
    """Load adapters with their factors; the base model takes their chat template."""
    parts = []
    for path, factor in zip(folders, weights, strict=True):
        loaded = load_adapter(path, base)
        base = base.with_adapter_template(loaded.template)
        parts.append(Weighted(loaded.adapter, factor))
    return base, parts


def _options(
    to: MergeTarget, dtype: DtypeOption, outtype: OutType, *, dequantize: bool
) -> MergeOptions:
    try:
        return MergeOptions(
            to=to,
            dtype=None if dtype == "auto" else dtype,
            out_type=None if outtype == "auto" else outtype,
            dequantize=dequantize,
        )
    except ConfigError as problem:
        raise OptionError(str(problem)) from None


def _weights(weight: float | Sequence[float], num_adapters: int) -> list[float]:
    """Return a factor for each adapter."""
    weights = [float(weight)] if isinstance(weight, (int, float)) else list(weight)
    if not all(map(math.isfinite, weights)):
        raise OptionError(f"--weight must be a number, got {', '.join(map(str, weights))}")
    if weights and len(weights) != num_adapters:
        raise OptionError(
            f"{num_adapters} --adapter and {len(weights)} --weight: give each adapter one, or none"
        )
    return weights or [1.0] * num_adapters


def _survival_notes(result: MergedModel) -> list[str]:
    worst = result.worst_module
    if worst is None:
        return ["nothing is changed: every delta, times its --weight, is 0"]
    if result.survival[worst].cosine >= _WELL_KEPT:
        return []
    return [
        f"{result.dtype} holds only part of the adapter (cosine "
        f"{result.survival[worst].cosine:.3f} in {worst}): merge with {result.exact_option}, or "
        "keep base and adapter apart"
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
        bits: bits of a weight, 4 or 8.
        revision: branch, tag or commit of a hub id.

    Raises:
        OptionError: when bits is not 4 or 8.
        ModelError: when the model cannot be used, or output already holds something.
        StorageError: when the disk is full.
    """
    if bits not in (4, 8):
        raise OptionError(f"bits must be 4 or 8, got {bits!r}")
    return quantize_base(model, folder_of(output), bits=bits, revision=revision)
