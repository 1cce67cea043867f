"""Tools that load adapters, with their formats and limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from phi3_lora.adapters.adapter import Adapter, uniform_adapter
from phi3_lora.adapters.formats.gguf import GGUF
from phi3_lora.adapters.formats.mlx_lm import MLX_LM
from phi3_lora.adapters.formats.peft import PEFT
from phi3_lora.adapters.formats.record import AdapterFormat, Refusal, hold_any, whole_weights_reason
from phi3_lora.adapters.names import split_layer
from phi3_lora.errors import AdapterError
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.family import peer_differences

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Allowed values of vLLM's --max-lora-rank; 16 is the default."""


def _no_hints(adapter: Adapter) -> list[str]:
    return []


class Consumer(NamedTuple):
    """A tool that loads adapters."""

    format: AdapterFormat
    """The format that the tool reads."""
    is_uniform: bool = True
    """True if the tool takes only one rank and one alpha / r for all modules."""
    hints: Callable[[Adapter], list[str]] = _no_hints
    """Return instructions on how to load an adapter in the tool."""
    peer: str | None = None
    """Name of the tool in peer_differences."""
    own_refusal: Refusal = hold_any
    """Limits of the tool beyond the limits of its format."""

    @property
    def layout(self) -> str:
        """Name of the format that the tool reads."""
        return self.format.name

    def refusal(self, adapter: Adapter) -> str | None:
        """Return the reason why the tool cannot hold an adapter, or None."""
        return self.format.refusal(adapter) or self.own_refusal(adapter)


def _vllm_refusal(adapter: Adapter) -> str | None:
    """Return the reason why vLLM cannot hold an adapter, or None.

    Source: vLLM, lora/peft_helper.py.
    """
    if adapter.use_dora:
        return "it uses DoRA"
    if adapter.saved:
        return whole_weights_reason(adapter)
    outside = [module for module in adapter.modules if split_layer(module) is None]
    if outside:
        return f"it adapts {outside[0]}, outside the decoder layers"
    r = _largest_rank(adapter)
    if r > _VLLM_RANKS[-1]:
        return f"its rank is {r}, and at most {_VLLM_RANKS[-1]} is taken; --rank cuts it, with loss"
    return None


def _vllm_hints(adapter: Adapter) -> list[str]:
    r = _largest_rank(adapter)
    needed = next((n for n in _VLLM_RANKS if n >= r), r)
    return [f"start vLLM with --enable-lora --max-lora-rank {needed} (this rank is {r})"]


def _llama_hints(adapter: Adapter) -> list[str]:
    return ["llama.cpp loads it beside the base's GGUF: llama-cli -m BASE.gguf --lora FILE.gguf"]


CONSUMERS: Mapping[str, Consumer] = {
    "vllm": Consumer(PEFT, hints=_vllm_hints, peer="vLLM", own_refusal=_vllm_refusal),
    "llama.cpp": Consumer(GGUF, hints=_llama_hints, peer="llama.cpp"),
    "ollama": Consumer(GGUF, peer="llama.cpp"),
    "mlx-lm": Consumer(MLX_LM, peer="mlx-lm"),
    "peft": Consumer(PEFT, is_uniform=False),
}


def _largest_rank(adapter: Adapter) -> int:
    return max((adapter.rank(module) for module in adapter.modules), default=0)


def adapted_for(
    name: str, adapter: Adapter, config: ModelConfig | None
) -> tuple[Adapter, list[str]]:
    """Adjust an adapter to a tool, and return notes for the user.

    Raises:
        AdapterError: when the tool cannot hold the adapter.
    """
    consumer = CONSUMERS[name]
    reason = consumer.refusal(adapter)
    if reason is not None:
        raise AdapterError(
            f"{name} cannot load this adapter: {reason}; merge it into its base instead (phi3-lora "
            "merge)"
        )
    notes = consumer.hints(adapter)
    if config is not None and consumer.peer in (found := peer_differences(config)):
        notes.append(f"{consumer.peer} {found[consumer.peer]}")
        if consumer.peer != "mlx-lm":
            limit = config.original_max_position_embeddings
            option = "--max-model-len" if consumer.peer == "vLLM" else "-c (Ollama: num_ctx)"
            notes.append(f"keep {option} at {limit:,} or less")
    if not consumer.is_uniform or adapter.is_uniform:
        return adapter, notes
    plain = uniform_adapter(adapter)
    notes.append(f"{name} knows one rank and one scale: all modules are padded to rank {plain.r}")
    return plain, notes


def faults_of(name: str, adapter: Adapter, layouts: set[str]) -> str:
    """Return yes, or why a tool cannot load the stored adapter and which command helps."""
    consumer = CONSUMERS[name]
    reason = consumer.refusal(adapter)
    if reason is not None:
        return f"no: {reason}"
    convert = f"phi3-lora convert --for {name}"
    if "unfused" in layouts:
        if name == "peft":
            return "yes, on a base that keeps q, k, v and gate, up apart"
        return f"no, it keeps q, k, v and gate, up apart: {convert} --model BASE"
    if consumer.layout not in layouts:
        return f"no, it reads another layout: {convert}"
    if name == "vllm" and not adapter.is_uniform:
        return f"it would ignore rank_pattern and alpha_pattern: {convert}"
    return "yes"
