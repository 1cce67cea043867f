"""Conversion of adapters between formats, with a measure of its error; numpy only."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.checks import check_fits
from phi3_lora.adapters.compress import compressed
from phi3_lora.adapters.deltas import factor_difference, relative_difference
from phi3_lora.adapters.fingerprint import FINGERPRINT_NAME
from phi3_lora.adapters.formats.folder import (
    TEMPLATE_NAME,
    check_apart,
    check_unused,
    write_adapter_folder,
)
from phi3_lora.adapters.formats.fused import RowNorms
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.reading import read_source
from phi3_lora.adapters.formats.record import FileFormat, Written
from phi3_lora.adapters.formats.registry import FILE_FORMATS, TARGETS
from phi3_lora.adapters.formats.tools import adapted_for
from phi3_lora.adapters.names import EMBEDDING, HEAD
from phi3_lora.errors import AdapterError
from phi3_lora.models.config import ModelConfig
from phi3_lora.storage.atomic import explained

SAME = 1e-6
"""|difference| / |delta| up to which a conversion changed only roundings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionRequest:
    """The source, the target and the settings of a conversion."""

    source: Path
    """An adapter folder, or a .pt, .gguf or .npz file."""
    target: Path
    """A folder that does not exist or is empty; for loralib and gguf, a new file."""
    to: str
    """A name in TARGETS."""
    consumer: str | None = None
    """Name in CONSUMERS of the tool that the result is for."""
    config: ModelConfig | None = None
    """Configuration of the base model, if known; unfused needs it."""
    row_norms: RowNorms | None = None
    """Norms of the base's weight rows; DoRA of separate q, k, v may need them."""
    missing: MissingMetadata = field(default_factory=MissingMetadata)
    """Values that a .pt or .npz does not store."""
    rank: int | None = None
    """The largest rank of the result; larger ranks are truncated."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """The outcome of a conversion."""

    source: str
    """Names of the formats in the source, joined by +."""
    to: str
    tensors: int
    lossless: bool
    """True if every number is the same, apart from zeros in the factors and powers of two."""
    max_weight_difference: float
    """Largest difference of a number in the factors; if these do not correspond, of a delta."""
    differences: dict[str, float]
    """|difference| / |delta| by module, in float64 and the Frobenius norm."""
    notes: list[str]
    adapters: tuple[Adapter, Adapter]
    """The source, and the result after reading it back."""

    @property
    def worst_module(self) -> str | None:
        """The module with the largest difference of its delta."""
        return max(self.differences, key=lambda m: self.differences[m], default=None)

    @property
    def max_relative_difference(self) -> float:
        """The largest difference of a module."""
        return max(self.differences.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures under the names of the command's JSON."""
        return {
            "from": self.source,
            "to": self.to,
            "tensors": self.tensors,
            "lossless": self.lossless,
            "max_weight_difference": self.max_weight_difference,
        }


def convert(request: ConversionRequest) -> Conversion:
    """Read an adapter of any format, write it in another, and read the result back.

    Raises:
        AdapterError: when the source is damaged, the target is in use, or its format cannot hold
            the adapter.
    """
    _check_target(request)
    source, layouts = read_source(
        request.source, request.config, request.missing, request.row_norms
    )
    _check_options(request, layouts)
    notes = _outside_notes(source) if request.config is None else []
    if request.config is not None:
        config = request.config
        check_fits(source, config.adaptable_shapes(), str(request.source), config.tensor_shapes())
    source = _with_layers(source, request.config)
    adapter, more = _shaped(request, source)
    outcome = _write(request, adapter)
    notes = [*source.notes, *notes, *more, *outcome.notes]
    written = _read_back(request, outcome.missing)
    differences = relative_difference(source, written)
    gap = factor_difference(source, written)
    return Conversion(
        source=layouts,
        to=request.to,
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


def _with_layers(adapter: Adapter, config: ModelConfig | None) -> Adapter:
    """Set the base model's number of layers, if it is known."""
    if config is None:
        return adapter
    return dataclasses.replace(adapter, num_layers=config.num_hidden_layers)


def _check_target(request: ConversionRequest) -> None:
    target = request.target
    if isinstance(TARGETS[request.to], FileFormat):
        if target.exists():
            raise AdapterError(f"{target} exists already: choose a new file")
        return
    check_unused(target)
    check_apart(target, request.source)


def _check_options(request: ConversionRequest, layouts: str) -> None:
    """Check that the conversion uses every given value of MissingMetadata."""
    used: set[str] = set()
    if layouts in FILE_FORMATS:
        used |= FILE_FORMATS[layouts].read_options
    target = TARGETS[request.to]
    if isinstance(target, FileFormat):
        used |= target.write_options
    missing = request.missing
    given = {
        "alpha": missing.alpha is not None,
        "prefix": bool(missing.prefix),
        "enable": bool(missing.enable),
        "parts": missing.parts is not None,
    }
    stray = [f"--{name}" for name, is_given in given.items() if is_given and name not in used]
    if stray:
        raise AdapterError(
            f"{', '.join(stray)} has no effect: {request.source} is in the format {layouts}, which "
            "does not need it"
        )


def _read_back(request: ConversionRequest, missing: MissingMetadata) -> Adapter:
    """Read the result; delete a result that cannot be read."""
    try:
        return read_source(request.target, request.config, missing, request.row_norms).adapter
    except AdapterError:
        if isinstance(TARGETS[request.to], FileFormat):
            request.target.unlink(missing_ok=True)
        else:
            shutil.rmtree(request.target, ignore_errors=True)
        raise


def _shaped(request: ConversionRequest, adapter: Adapter) -> tuple[Adapter, list[str]]:
    """Truncate the adapter and adjust it to the tool, as the request says."""
    notes = []
    if request.rank is not None:
        adapter, lost = compressed(adapter, request.rank)
        if lost:
            worst = max(lost, key=lambda module: lost[module])
            notes.append(
                f"cut to rank {request.rank}: {len(lost)} deltas lost up to {lost[worst]:.2%} of "
                f"their size ({worst})"
            )
    if request.consumer is not None:
        adapter, more = adapted_for(request.consumer, adapter, request.config)
        notes += more
    return adapter, notes


def _card_line(request: ConversionRequest, adapter: Adapter) -> str:
    """Build the section on the conversion for the model card."""
    what = request.to if request.consumer is None else f"{request.to}, for {request.consumer}"
    cut = "" if request.rank is None else f", cut to rank {request.rank}"
    return (
        f"\n## Converted\n\nBy phi3-lora, to {what}{cut}: here rank, alpha and scale are "
        f"{adapter.r}, {adapter.lora_alpha:g} and {adapter.scaling:g}.\n"
    )


def _write(request: ConversionRequest, adapter: Adapter) -> Written:
    """Write the target."""
    target, to = request.target, TARGETS[request.to]
    if isinstance(to, FileFormat):
        assert to.write is not None
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        return to.write(target, adapter, request.missing)
    # The fingerprint does not depend on the format.
    names = (FINGERPRINT_NAME, TEMPLATE_NAME, "README.md") if request.source.is_dir() else ()
    files = {n: (request.source / n).read_bytes() for n in names if (request.source / n).exists()}
    if request.rank is not None:
        files.pop(FINGERPRINT_NAME, None)
    if "README.md" in files:
        files["README.md"] += _card_line(request, adapter).encode()
    notes = write_adapter_folder(target, adapter, to=request.to, base=request.config, files=files)
    for member in to.members:
        notes += member.conversion_notes(adapter)
    return Written(notes=notes)
