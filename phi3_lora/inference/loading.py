"""Steps of training, scoring and generation: check a base model, load an adapter, open both."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.checks import check_fits
from phi3_lora.adapters.fingerprint import base_identity
from phi3_lora.adapters.formats.folder import TEMPLATE_NAME
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.reading import read_source
from phi3_lora.engine.protocol import Backend, Engine
from phi3_lora.engine.registry import choose_backend
from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import ConfigError, ModelError
from phi3_lora.hub.download import resolve_adapter_dir
from phi3_lora.inference.base_model import CheckedModel, FoundModel
from phi3_lora.models.quantization.cache import quantized_copy
from phi3_lora.models.quantization.grid import GRID_BITS
from phi3_lora.models.weights import check_model_files, model_identity
from phi3_lora.storage.cache import Note


def check_base_model(found: FoundModel) -> CheckedModel:
    """Check the weights in the folder of a base model.

    Raises:
        ModelError: when a tensor is missing, extra, mis-shaped or not finite.
    """
    files = check_model_files(found.path, found.config)
    identity = model_identity(files.path, files.tensors)
    own = found.backend_quantization
    return CheckedModel(found, files, identity if own == "none" else f"{identity}-{own}")


def check_for_backend(found: FoundModel, backend: Backend, note: Note) -> CheckedModel:
    """Quantise a base model on a shared grid if asked to, and check the weights to load.

    Args:
        found: the base model and the quantisation to load it with.
        backend: the backend that will load the model.
        note: receives a line before work that takes time.

    Raises:
        ConfigError: when the backend does not have this quantisation.
        ModelError: when a tensor is missing, extra, mis-shaped or not finite, or the model already
            has another quantisation.
    """
    bits = GRID_BITS.get(found.quantize)
    if bits is not None and found.config.grid_bits != bits:
        files = quantized_copy(found.path, found.config, bits=bits, note=note)
        return CheckedModel(found, files, model_identity(files.path, files.tensors))
    own = found.backend_quantization
    if own not in {"none", *backend.quantizations}:
        raise ConfigError(
            f"--quantize {own} is not available with --backend {backend.name}; allowed: "
            f"{', '.join(['none', *GRID_BITS, *sorted(backend.quantizations)])} (4bit and 8bit are "
            "the same weights on both backends)"
        )
    if own != "none" and found.config.quantization is not None:
        raise ModelError(f"{found.name} is quantised already: leave out --quantize {own}")
    return check_base_model(found)


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that fits its base model, and the chat template that it was trained with."""

    adapter: Adapter
    template: Path | None
    """A Jinja file; None if training used the model's own template."""


def load_adapter(path: str, base: FoundModel) -> LoadedAdapter:
    """Read an adapter from a folder or a hub id, in any layout, and check it against a base model.

    Raises:
        AdapterError: when the adapter is damaged or does not fit.
    """
    folder = resolve_adapter_dir(path)
    adapter, _ = read_source(folder, base.config, MissingMetadata(), base.row_norms)
    check_fits(adapter, base.config.adaptable_shapes(), path, base.config.tensor_shapes())
    adapter = dataclasses.replace(
        adapter,
        num_layers=base.config.num_hidden_layers,
        base_identity=base_identity(folder),
    )
    template = folder / TEMPLATE_NAME
    return LoadedAdapter(adapter, template if template.exists() else None)


def with_adapter(base: FoundModel, path: str | None) -> tuple[FoundModel, Adapter | None]:
    """Load an adapter, and give the base model the adapter's chat template.

    Args:
        base: the model to adapt.
        path: a folder or a hub id; None for the base model alone.

    Raises:
        AdapterError: when the adapter is damaged or does not fit.
        ConfigError: when its chat template cannot be used.
    """
    if path is None:
        return base, None
    loaded = load_adapter(path, base)
    return base.with_adapter_template(loaded.template), loaded.adapter


def other_base_notes(adapter: Adapter | None, identity: str) -> list[str]:
    """Return a warning if an adapter was trained on another base model.

    Args:
        adapter: the adapter, with the identity of its own base model if that is known.
        identity: identity of the base model here.
    """
    if adapter is None or adapter.base_identity in (None, identity):
        return []
    return [
        "this adapter was trained on another base model, or on other weights of it; phi3-lora "
        "verify shows whether it behaves the same here"
    ]


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine and the base model that it holds."""

    engine: Engine
    base: CheckedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The backend, the device and the dtype to open a model with."""

    backend: str = "auto"
    """mlx, cuda or auto."""
    device: str = "auto"
    """auto, cpu or gpu."""
    dtype: str = "auto"
    """Dtype of the base model: float32, bfloat16, float16 or auto."""


def open_engine(
    base: FoundModel, adapter: Adapter | None, placement: Placement, note: Note
) -> Opened:
    """Open a model for scoring and generation, with or without an adapter.

    Args:
        base: the model to check and load.
        adapter: an adapter that was checked against the base.
        placement: the backend, device and dtype.
        note: receives each text for the user, before the work starts.

    Raises:
        BackendUnavailableError: when the backend or device is missing.
        ModelError: when the weights cannot be used.
    """
    chosen, wanted, choice = choose_backend(placement.backend, placement.device)
    if choice:
        note(choice)
    checked = check_for_backend(base, chosen, note)
    for text in other_base_notes(adapter, checked.identity):
        note(text)
    engine = chosen.open(
        LoadRequest(
            model=checked.files,
            dtype=placement.dtype,
            device=wanted,
            quantize=base.backend_quantization,
            lora=None if adapter is None else dataclasses.replace(adapter.spec, dropout=0.0),
        )
    )
    if adapter is not None:
        engine.write_adapter(adapter.weights)
    return Opened(engine, checked)
