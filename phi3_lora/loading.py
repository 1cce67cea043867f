"""The steps that train, evaluate and generate share: model folder, tokenizer, engine, adapter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from phi3_lora.adapters.adapter import Adapter, check_fits
from phi3_lora.adapters.folder import read_adapter
from phi3_lora.backend import Engine, LoadRequest
from phi3_lora.data.tokenizer import ChatTokenizer
from phi3_lora.hub import resolve_model_dir
from phi3_lora.model_folder import read_model_config
from phi3_lora.models import ModelConfig
from phi3_lora.registry import choose_backend
from phi3_lora.weights import check_weights, model_identity


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model that was looked at but not loaded."""

    name: str
    path: Path
    config: ModelConfig
    tokenizer: ChatTokenizer

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: the model's own and the template's end of turn."""
        end = self.tokenizer.end_of_turn_id
        return self.config.stop_ids | (frozenset() if end is None else {end})


def look_at_model(
    model: str, revision: str | None = None, *, with_weights: bool = True
) -> BaseModel:
    """Find a base model and read its config and tokenizer.

    Args:
        model: a folder, a hub id, or demo.
        revision: branch, tag or commit of a hub id.
        with_weights: whether to download the weights of a hub id, too.

    Raises:
        ModelError: when it cannot be used.
    """
    path = resolve_model_dir(model, revision, with_weights=with_weights)
    config = read_model_config(path)
    return BaseModel(model, path, config, ChatTokenizer(path, vocab_size=config.vocab_size))


def check_base(base: BaseModel) -> str:
    """Check a base model's weights and return the model's identity.

    Raises:
        ModelError: when a tensor is missing, extra, mis-shaped or not finite.
    """
    return model_identity(base.path, check_weights(base.path, base.config))


def load_adapter(path: str, base: BaseModel) -> Adapter:
    """An adapter folder of either layout, checked against a base model.

    Raises:
        AdapterError: when it is damaged or does not fit.
    """
    adapter = read_adapter(Path(path))
    check_fits(adapter, base.config.linear_shapes(), path)
    return dataclasses.replace(adapter, num_layers=base.config.num_hidden_layers)


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine, and how it came to be."""

    engine: Engine
    identity: str
    """Of the base model."""
    note: str


def open_engine(
    base: BaseModel,
    *,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    adapter: Adapter | None,
) -> Opened:
    """Open a model for scoring and generation, with an adapter or bare; None means auto.

    Raises:
        BackendUnavailableError: when the backend or device is missing.
        ModelError: when the weights cannot be used.
    """
    chosen, wanted, note = choose_backend(backend or "auto", device or "auto")
    identity = check_base(base)
    engine = chosen.open(
        LoadRequest(
            model_dir=base.path,
            dtype=dtype or "auto",
            device=wanted,
            lora=None if adapter is None else dataclasses.replace(adapter.spec, dropout=0.0),
        )
    )
    if adapter is not None:
        engine.write_adapter(adapter.weights)
    return Opened(engine, identity, note)
