"""Adapters from one layout to another, and how exact that was; numpy only."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter, check_fits, uniform_adapter
from phi3_lora.adapters.compress import compressed
from phi3_lora.adapters.deltas import relative_difference
from phi3_lora.adapters.formats.folder import (
    FINGERPRINT_NAME,
    TEMPLATE_NAME,
    check_apart,
    check_unused,
    write_adapter_folder,
)
from phi3_lora.adapters.formats.fused import RowNorms
from phi3_lora.adapters.formats.gguf import write_gguf_adapter
from phi3_lora.adapters.formats.loralib import Untold, to_loralib
from phi3_lora.adapters.formats.sources import read_source, with_layers
from phi3_lora.adapters.formats.tools import adapted_for
from phi3_lora.adapters.formats.torch_pickle import encode_torch_file
from phi3_lora.adapters.names import EMBEDDING, HEAD, lora_a_name, lora_b_name
from phi3_lora.errors import AdapterError
from phi3_lora.models.config import ModelConfig
from phi3_lora.storage.atomic import explained, replace_file

FILE_LAYOUTS = ("loralib", "gguf")
"""Layouts that are one file."""
SAME = 1e-6
"""|difference| / |delta| up to which a conversion changed nothing but roundings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to convert, and into what."""

    source: Path
    """An adapter folder, or a .pt, .gguf or .npz file."""
    target: Path
    """A folder that does not exist or is empty; for loralib and gguf, a new file."""
    to: str
    """peft, mlx, both, unfused, loralib or gguf."""
    consumer: str | None = None
    """A tool, by its name in CONSUMERS, whose rules are kept."""
    config: ModelConfig | None = None
    """The base model's shape, if known; unfused needs it."""
    row_norms: RowNorms | None = None
    """Of the base's weights, which DoRA of separate q, k, v may need."""
    untold: Untold = field(default_factory=Untold)
    """What a .pt or .npz does not say."""
    rank: int | None = None
    """The largest rank of the result: what lies above is lost."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did."""

    source: str
    """Layouts found in the source, joined by +."""
    to: str
    tensors: int
    lossless: bool
    """Whether every number is the same, but for zeros in its factors and powers of two."""
    max_weight_difference: float
    """Largest difference of a number of the factors; where those are others, of a delta."""
    differences: dict[str, float]
    """|difference| / |delta| by module, in float64 and the Frobenius norm."""
    notes: list[str]
    adapters: tuple[Adapter, Adapter]
    """The source, and the result as read back."""

    @property
    def worst_module(self) -> str | None:
        """The module whose delta differs most."""
        return max(self.differences, key=lambda m: self.differences[m], default=None)

    @property
    def max_relative_difference(self) -> float:
        """Over the modules."""
        return max(self.differences.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The figures under the names of the command's JSON."""
        return {
            "from": self.source,
            "to": self.to,
            "tensors": self.tensors,
            "lossless": self.lossless,
            "max_weight_difference": self.max_weight_difference,
        }


def convert(job: Job) -> Conversion:
    """Read an adapter of any layout, write it in another, and read the result back.

    Raises:
        AdapterError: when the source is damaged, the target is in use, or cannot hold it.
    """
    _check_target(job)
    source, layouts = read_source(job.source, job.config, job.untold, job.row_norms)
    _check_untold(job, layouts)
    notes = _outside_notes(source) if job.config is None else []
    if job.config is not None:
        config = job.config
        check_fits(source, config.adaptable_shapes(), str(job.source), config.tensor_shapes())
    source = with_layers(source, job.config)
    adapter, more = _shaped(job, source)
    notes = [*source.notes, *notes, *more, *_write(job, adapter)]
    written = _read_back(job, adapter)
    differences = relative_difference(source, written)
    gap = _factor_difference(source, written)
    return Conversion(
        source=layouts,
        to=job.to,
        tensors=len(written.weights),
        lossless=gap == 0.0,
        max_weight_difference=max(differences.values(), default=0.0) if gap is None else gap,
        differences=differences,
        notes=notes,
        adapters=(source, written),
    )


def _outside_notes(source: Adapter) -> list[str]:
    outside = sorted({EMBEDDING, HEAD} & {*source.modules, *source.saved})
    if not outside:
        return []
    return [
        f"it adapts {' and '.join(outside)}: on a model whose head is its embedding PEFT and "
        "mlx-lm take that for different things; pass --model to check"
    ]


def _check_target(job: Job) -> None:
    target = job.target
    if job.to in FILE_LAYOUTS:
        if target.exists():
            raise AdapterError(f"{target} exists already: choose a new file")
        return
    check_unused(target)
    check_apart(target, job.source)


def _check_untold(job: Job, layouts: str) -> None:
    """Make sure that what was told is used."""
    untold = job.untold
    told = {
        "--alpha": untold.alpha is not None and layouts not in ("loralib", "npz"),
        "--prefix": bool(untold.prefix) and "loralib" not in (layouts, job.to),
        "--enable": bool(untold.enable) and layouts != "loralib",
        "--parts": untold.parts is not None and layouts != "loralib",
    }
    stray = [option for option, is_stray in told.items() if is_stray]
    if stray:
        raise AdapterError(
            f"{', '.join(stray)} has no effect: {job.source} is of {layouts}, which says it itself"
        )


def _read_back(job: Job, adapter: Adapter) -> Adapter:
    """The result as it was written; one that cannot be read is not left behind."""
    told = Untold()
    if job.to == "loralib":
        # What loralib leaves out is known here.
        told = Untold(adapter.scaling * adapter.r, job.untold.prefix)
    try:
        return read_source(job.target, job.config, told, job.row_norms)[0]
    except AdapterError:
        if job.to in FILE_LAYOUTS:
            job.target.unlink(missing_ok=True)
        else:
            shutil.rmtree(job.target, ignore_errors=True)
        raise


def _shaped(job: Job, adapter: Adapter) -> tuple[Adapter, list[str]]:
    """The adapter in the rank, and by the rules, that were asked for."""
    notes = []
    if job.rank is not None:
        adapter, lost = compressed(adapter, job.rank)
        if lost:
            worst = max(lost, key=lambda module: lost[module])
            notes.append(
                f"cut to rank {job.rank}: {len(lost)} deltas lost up to {lost[worst]:.2%} of their "
                f"size ({worst})"
            )
    if job.consumer is not None:
        adapter, more = adapted_for(job.consumer, adapter, job.config)
        notes += more
    # loralib has one alpha for all layers of one rank.
    return uniform_adapter(adapter) if job.to == "loralib" else adapter, notes


def _card_line(job: Job, adapter: Adapter) -> str:
    """What a model card does not know of the converted adapter."""
    what = job.to if job.consumer is None else f"{job.to}, for {job.consumer}"
    cut = "" if job.rank is None else f", cut to rank {job.rank}"
    return (
        f"\n## Converted\n\nBy phi3-lora, to {what}{cut}: here rank, alpha and scale are "
        f"{adapter.r}, {adapter.lora_alpha:g} and {adapter.scaling:g}.\n"
    )


def _factor_difference(source: Adapter, written: Adapter) -> float | None:
    """Largest difference of a number, after scales are put into B; None for other factors."""
    if set(source.modules) != set(written.modules):
        return None
    gaps = [_pair_difference(source, written, module) for module in source.modules]
    factors = {name(m) for m in source.modules for name in (lora_a_name, lora_b_name)}
    for name in (source.weights.keys() | written.weights.keys()) - factors:
        first, second = source.weights.get(name), written.weights.get(name)
        gaps.append(None if first is None or second is None else _largest(first - second))
    return None if None in gaps else max((gap for gap in gaps if gap is not None), default=0.0)


def _pair_difference(source: Adapter, written: Adapter, module: str) -> float | None:
    (a, b), (other_a, other_b) = source.pair(module), written.pair(module)
    r = min(len(a), len(other_a))
    if any(f.any() for f in (a[r:], b[:, r:], other_a[r:], other_b[:, r:])):
        return None
    ratio = written.scaling_of(module) / source.scaling_of(module)
    # Two roundings of one scale are the same scale.
    ratio = 1.0 if abs(ratio - 1.0) <= 1e-7 else ratio
    return max(
        _largest(a[:r] - other_a[:r]), _largest(b[:, :r] - other_b[:, :r] * np.float32(ratio))
    )


def _largest(value: np.ndarray) -> float:
    return float(np.abs(value).max(initial=0.0))


def _write(job: Job, adapter: Adapter) -> list[str]:
    """Write the target; returns what the user should know."""
    target = job.target
    if job.to in FILE_LAYOUTS:
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
    if job.to == "gguf":
        write_gguf_adapter(target, adapter)
        return []
    if job.to == "loralib":
        replace_file(target, encode_torch_file(to_loralib(adapter, job.untold.prefix)))
        return [
            f"loralib stores neither rank nor alpha: r is {adapter.r}, lora_alpha "
            f"{adapter.scaling * adapter.r:.9g}"
        ]
    # What it answered where it was trained holds in every layout.
    names = (FINGERPRINT_NAME, TEMPLATE_NAME, "README.md") if job.source.is_dir() else ()
    files = {n: (job.source / n).read_bytes() for n in names if (job.source / n).exists()}
    if job.rank is not None:
        files.pop(FINGERPRINT_NAME, None)
    if "README.md" in files:
        files["README.md"] += _card_line(job, adapter).encode()
    notes = write_adapter_folder(target, adapter, to=job.to, base=job.config, files=files)
    if adapter.num_layers is None and job.to in ("mlx", "both"):
        notes.append(
            "the base model's number of layers is not known, and mlx-lm takes the adapted layers "
            "for its last ones: pass --model to check"
        )
    return notes
