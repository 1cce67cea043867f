"""Read and check config.json of a model folder, without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from phi3_lora.errors import ModelError, listing
from phi3_lora.models.config import Dtype, ModelConfig, RopeConfig
from phi3_lora.models.config_checks import contradictions
from phi3_lora.models.quantization.grid import GRID_BITS, GROUP_SIZE
from phi3_lora.storage.json_file import read_json


def read_model_config(model_dir: Path) -> ModelConfig:
    """Read and check the shape of the model in a folder.

    Raises:
        ModelError: when config.json is missing, belongs to another architecture, or has values that
            contradict each other; the message lists all of them.
    """
    raw = read_json(model_dir / "config.json")
    try:
        _refuse_other_models(raw, model_dir)
        config = _parse(raw, model_dir)
    except ModelError:
        raise
    except KeyError as missing:
        raise ModelError(f"{model_dir}/config.json lacks {missing}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as cause:
        raise ModelError(
            f"{model_dir}/config.json has a value of the wrong type: {cause}"
        ) from None
    problems = contradictions(config, raw)
    if problems:
        raise ModelError(listing(f"{model_dir}/config.json cannot be used:", problems))
    return config


def _refuse_other_models(raw: Mapping[str, Any], model_dir: Path) -> None:
    architectures = raw.get("architectures") or ["Phi3ForCausalLM"]
    if raw.get("model_type") != "phi3" or "Phi3ForCausalLM" not in architectures:
        raise ModelError(
            f"{model_dir} is not a Phi-3 architecture: config.json says model_type "
            f"{raw.get('model_type')!r}, architectures {architectures}; only model_type 'phi3' "
            "with Phi3ForCausalLM works (Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini)"
        )
    unsafe = sorted(k for k in raw if k.endswith("_internal") or k == "model_file")
    if unsafe:
        raise ModelError(
            f"{model_dir}/config.json holds {', '.join(unsafe)}, which can make a library run code "
            "from elsewhere; delete the key if you trust the rest of the folder"
        )
    biased = [k for k in ("attention_bias", "mlp_bias") if raw.get(k)]
    if biased:
        raise ModelError(f"{model_dir}/config.json sets {', '.join(biased)}: Phi-3 has no biases")


def _whole(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Read an integer from config.json; a text, a fraction or true is an error."""
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if name not in raw:
        raise KeyError(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return value


def _parse(raw: Mapping[str, Any], model_dir: Path) -> ModelConfig:
    heads, hidden = _whole(raw, "num_attention_heads"), _whole(raw, "hidden_size")
    max_positions = _whole(raw, "max_position_embeddings", 4096)
    scaling = dict(raw.get("rope_scaling") or {})
    rope = {**scaling, **(raw.get("rope_parameters") or {})}
    original = raw.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings"
    )
    # Without a LongRoPE boundary in config.json, transformers' Phi3Config uses 4096.
    is_long = bool(rope.get("long_factor"))
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    window = None if raw.get("sliding_window") is None else _whole(raw, "sliding_window")
    return ModelConfig(
        vocab_size=_whole(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_whole(raw, "intermediate_size"),
        num_hidden_layers=_whole(raw, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_whole(raw, "num_key_value_heads", heads),
        head_dim=_whole(raw, "head_dim", hidden // heads if heads else 0),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
        max_position_embeddings=max_positions,
        original_max_position_embeddings=int(original or (4096 if is_long else max_positions)),
        # 2**30 is longer than any document; kernels take 32-bit numbers.
        sliding_window=None if window is None else min(window, 2**30),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope=_parse_rope(raw, rope, model_dir),
        stop_ids=_stop_ids(raw, model_dir),
        # contradictions() checks the dtype, to report all problems together.
        dtype=cast(Dtype, dtype),
        quantization=raw.get("quantization") or raw.get("quantization_config") or None,
        grid_bits=_grid_bits(raw),
    )


def in_both_styles(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return config.json with rotary settings for mlx-lm, transformers 4 and transformers 5.

    auto_map is left out, because the folders that we write contain no code.

    Args:
        raw: config.json of the model.
        config: the parsed config.json.
    """
    rope = config.rope
    base = {
        "rope_theta": rope.theta,
        "partial_rotary_factor": rope.partial_rotary_factor,
        "original_max_position_embeddings": config.original_max_position_embeddings,
    }
    scaling: dict[str, Any] | None = None
    if rope.long_factor is not None and rope.short_factor is not None:
        scaling = {"type": "longrope", "rope_type": "longrope"}
        scaling |= {"short_factor": [*rope.short_factor], "long_factor": [*rope.long_factor]}
        ratios = {"factor": rope.factor, "attention_factor": rope.attention_factor}
        scaling |= {name: value for name, value in ratios.items() if value is not None}
    parameters = {"rope_type": "default", **base, **(scaling or {})}
    parameters.pop("type", None)
    own = {key: value for key, value in raw.items() if key != "auto_map"}
    return {**own, **base, "rope_scaling": scaling, "rope_parameters": parameters}


def grid_config(bits: int, dense: Sequence[str] = ()) -> dict[str, Any]:
    """Return config.json's keys of a shared grid, for mlx-lm and for compressed-tensors.

    Args:
        bits: 4 or 8.
        dense: paths of the decoder's linear layers that are not on the grid.
    """
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP_SIZE,
    }
    return {
        "quantization": {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"},
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head", *dense],
        },
    }


def _grid_bits(raw: Mapping[str, Any]) -> int | None:
    dense = (raw.get("quantization_config") or {}).get("ignore", [])[1:]
    for bits in GRID_BITS.values():
        if all(raw.get(key) == value for key, value in grid_config(bits, dense).items()):
            return bits
    return None


def _parse_rope(raw: Mapping[str, Any], rope: Mapping[str, Any], model_dir: Path) -> RopeConfig:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "longrope", "su", "yarn"):
        raise ModelError(
            f"{model_dir}/config.json: rope type {kind!r} is not one of Phi-3's: default, longrope"
        )
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if kind == "default":
        return RopeConfig(theta=float(theta), partial_rotary_factor=float(partial))
    factor, ratio = rope.get("attention_factor"), rope.get("factor")
    return RopeConfig(
        theta=float(theta),
        partial_rotary_factor=float(partial),
        short_factor=tuple(float(x) for x in rope["short_factor"]),
        long_factor=tuple(float(x) for x in rope["long_factor"]),
        attention_factor=None if factor is None else float(factor),
        factor=None if ratio is None else float(ratio),
    )


def _stop_ids(raw: Mapping[str, Any], model_dir: Path) -> frozenset[int]:
    path = model_dir / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    found: set[int] = set()
    for source in (raw, generation):
        value = source.get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        found.update(_whole({"eos_token_id": one}, "eos_token_id") for one in values)
    return frozenset(found)
