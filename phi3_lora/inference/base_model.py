"""A base model before an engine opens it: found without weights, then checked with them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from phi3_lora.adapters.initialization import row_norms
from phi3_lora.arrays import Float32
from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.hub.download import resolve_model_dir
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.quantization.folder import dense_weight
from phi3_lora.models.quantization.grid import GRID_BITS
from phi3_lora.models.weights import ModelFiles, tensor_index


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A base model whose config and tokenizer were read; its weights may be missing."""

    name: str
    """The user's name for the model: a folder, a hub id, or demo."""
    path: Path
    config: ModelConfig
    tokenizer: ChatTokenizer
    quantize: str = "none"
    """Quantisation to load the weights with, one of QUANTIZATIONS."""

    @property
    def backend_quantization(self) -> str:
        """Quantisation that the backend makes while loading; none for a shared grid."""
        return "none" if self.quantize in GRID_BITS else self.quantize

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: the model's own and the template's end of turn."""
        return frozenset(self.config.answer_stop_ids(self.tokenizer.end_of_turn_id))

    def row_norms(self, module: str) -> Float32:
        """Return the Euclidean norm of each row of a module's weight, (out,).

        Raises:
            ModelError: when the files are missing, or only a backend can read their quantisation.
        """
        tensors = tensor_index(self.path, self.config)
        return row_norms(dense_weight(tensors, self.config, module))

    def with_adapter_template(self, template: Path | None) -> FoundModel:
        """Return the model with an adapter's chat template, unless the user chose a template.

        Args:
            template: a Jinja file; None if the adapter was trained with the model's own template.

        Raises:
            ConfigError: when the template cannot be used.
        """
        if template is None or self.tokenizer.has_own_template:
            return self
        tokenizer = ChatTokenizer(
            self.path, vocab_size=self.config.vocab_size, template_file=template
        )
        return dataclasses.replace(self, tokenizer=tokenizer)


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A base model whose weights were checked and are ready to load."""

    found: FoundModel
    files: ModelFiles
    """The files to load: the model's own, or a quantised copy on a shared grid."""
    identity: str
    """A digest of the weights; equal identities mean equal weights on every backend."""

    def weight(self, module: str) -> Float32:
        """Read the weight of a module in full, (out, in) or (hidden,), in float32.

        Raises:
            ModelError: when only a backend can read its quantisation.
        """
        return dense_weight(self.files.tensors, self.files.config, module)


def find_base_model(
    model: str,
    revision: str | None = None,
    *,
    quantize: str | None = None,
    with_weights: bool = True,
    chat_template: str | None = None,
) -> FoundModel:
    """Find a base model and read its config and tokenizer.

    Args:
        model: a folder, a hub id, or demo.
        revision: branch, tag or commit of a hub id.
        quantize: quantisation to load the weights with; None is the same as none.
        with_weights: whether to download the weights of a hub id too.
        chat_template: a Jinja file that replaces the model's own template.

    Raises:
        ModelError: when the model cannot be used.
        ConfigError: when the template cannot be used.
    """
    path = resolve_model_dir(model, revision, with_weights=with_weights)
    config = read_model_config(path)
    tokenizer = ChatTokenizer(path, vocab_size=config.vocab_size, template_file=chat_template)
    return FoundModel(model, path, config, tokenizer, quantize or "none")
