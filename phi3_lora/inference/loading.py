"""The steps that train, evaluate and generate share: model folder, tokenizer, engine, adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from phi3_lora.adapters.adapter import Adapter, check_fits
from phi3_lora.adapters.fingerprint import base_identity
from phi3_lora.adapters.formats.folder import TEMPLATE_NAME
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.reading import read_source
from phi3_lora.engine.protocol import Backend, Engine
from phi3_lora.engine.registry import choose_backend
from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import ConfigError, ModelError
from phi3_lora.hub.download import resolve_adapter_dir
from phi3_lora.inference.base_model import BaseModel
from phi3_lora.models.quantization.cache import quantized_copy
from phi3_lora.models.quantization.grid import GRID_BITS
from phi3_lora.models.weights import check_weights, model_identity


def prepare_weights(
    base: BaseModel, backend: Backend, note: Callable[[str], None]
) -> tuple[BaseModel, str]:
    """Quantise a base model as asked, check its weights, and tell the model's identity.

    Args:
        base: as looked at.
        backend: that will load it.
        note: told of work that takes time.

    Returns:
        The base to load, and its identity: equal where every backend sees the same numbers.

    Raises:
        ConfigError: when the backend has no such quantisation.
        ModelError: when a tensor is missing, extra, mis-shaped or not finite, or the model is
            quantised already in another way.
    """
    bits = GRID_BITS.get(base.quantize)
    if bits is not None and base.config.grid_bits != bits:
        path, config, tensors = quantized_copy(base.path, base.config, bits=bits, note=note)
        base = dataclasses.replace(base, path=path, config=config)
        return base, model_identity(path, tensors)
    own = base.own_quantization
    if own not in {"none", *backend.quantizations}:
        raise ConfigError(
            f"--quantize {own} is not one of --backend {backend.name}'s; allowed: "
            f"{', '.join(['none', *GRID_BITS, *sorted(backend.quantizations)])} (4bit and 8bit are "
            "the same weights on both backends)"
        )
    if own != "none" and base.config.quantization is not None:
        raise ModelError(f"{base.name} is quantised already: leave out --quantize {own}")
    identity = model_identity(base.path, check_weights(base.path, base.config))
    return base, identity if own == "none" else f"{identity}-{own}"


def load_adapter(path: str, base: BaseModel) -> Adapter:
    """An adapter of a folder or a hub id, in any layout, checked against a base model.

    Where it was trained with a chat template of its own, and the base has the model's, the base's
    tokenizer takes that one: another would ask the adapter what it was never taught.

    Raises:
        AdapterError: when it is damaged or does not fit.
        ConfigError: when its chat template cannot be used.
    """
    folder = resolve_adapter_dir(path)
    adapter, _ = read_source(folder, base.config, MissingMetadata(), base.row_norms)
    check_fits(adapter, base.config.adaptable_shapes(), path, base.config.tensor_shapes())
    template = folder / TEMPLATE_NAME
    if template.exists() and not base.tokenizer.has_own_template:
        base.tokenizer.use_template_file(template)
    return dataclasses.replace(
        adapter,
        num_layers=base.config.num_hidden_layers,
        base_identity=base_identity(folder),
    )


def other_base_notes(adapter: Adapter | None, identity: str) -> list[str]:
    """A warning if an adapter names another base model than this one, by identity."""
    if adapter is None or adapter.base_identity in (None, identity):
        return []
    return [
        "this adapter was trained on another base model, or on other weights of it; phi3-lora "
        "verify tells whether it behaves here as it did there"
    ]


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine, and how it came to be."""

    engine: Engine
    identity: str
    """Of the base model."""


def open_engine(
    base: BaseModel,
    *,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    adapter: Adapter | None,
    note: Callable[[str], None],
) -> Opened:
    """Open a model for scoring and generation, with an adapter or bare; None means auto.

    Args:
        base: as looked at.
        backend: mlx, cuda or auto.
        device: auto, cpu or gpu.
        dtype: of the base.
        adapter: checked against the base.
        note: told what the user should know, before the work that it is about.

    Raises:
        BackendUnavailableError: when the backend or device is missing.
        ModelError: when the weights cannot be used.
    """
    chosen, wanted, choice = choose_backend(backend or "auto", device or "auto")
    if choice:
        note(choice)
    base, identity = prepare_weights(base, chosen, note)
    for text in other_base_notes(adapter, identity):
        note(text)
    engine = chosen.open(
        LoadRequest(
            model_dir=base.path,
            dtype=dtype or "auto",
            device=wanted,
            quantize=base.own_quantization,
            lora=None if adapter is None else dataclasses.replace(adapter.spec, dropout=0.0),
        )
    )
    if adapter is not None:
        engine.write_adapter(adapter.weights)
    return Opened(engine, identity)
