"""A base model that was found but not loaded."""

from __future__ import annotations

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
from phi3_lora.models.weights import tensor_index


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model that was looked at but not loaded."""

    name: str
    path: Path
    config: ModelConfig
    tokenizer: ChatTokenizer
    quantize: str = "none"
    """How the weights are to be quantised, as QUANTIZATIONS names it."""

    @property
    def own_quantization(self) -> str:
        """What a backend must do itself; a shared grid is in the files."""
        return "none" if self.quantize in GRID_BITS else self.quantize

    def weight(self, module: str) -> Float32:
        """The weight of a module in full, (out, in) or (hidden,), in float32.

        Raises:
            ModelError: when the files are missing, or quantised as only a backend can read.
        """
        return dense_weight(tensor_index(self.path, self.config), self.config, module)

    def row_norms(self, module: str) -> Float32:
        """Euclidean norm of each row of a module's weight."""
        return row_norms(self.weight(module))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: the model's own and the template's end of turn."""
        end = self.tokenizer.end_of_turn_id
        return self.config.stop_ids | (frozenset() if end is None else {end})


def look_at_model(
    model: str,
    revision: str | None = None,
    *,
    quantize: str | None = None,
    with_weights: bool = True,
    chat_template: str | None = None,
) -> BaseModel:
    """Find a base model and read its config and tokenizer.

    Args:
        model: a folder, a hub id, or demo.
        revision: branch, tag or commit of a hub id.
        quantize: how prepare_weights is to quantise it; None means none.
        with_weights: whether to download the weights of a hub id, too.
        chat_template: a Jinja file in place of the model's own template.

    Raises:
        ModelError: when it cannot be used.
        ConfigError: when the template cannot be used.
    """
    path = resolve_model_dir(model, revision, with_weights=with_weights)
    config = read_model_config(path)
    tokenizer = ChatTokenizer(path, vocab_size=config.vocab_size, template_file=chat_template)
    return BaseModel(model, path, config, tokenizer, quantize or "none")
