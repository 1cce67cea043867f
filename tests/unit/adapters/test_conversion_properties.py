"""Conversion of every format to every other and back, for random models and adapters."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.checks import check_fits
from phi3_lora.adapters.convert import SAME, ConversionRequest, convert
from phi3_lora.adapters.deltas import relative_difference
from phi3_lora.adapters.formats.folder import read_adapter, write_adapter_folder
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.mlx_lm import for_mlx, mlx_config, mlx_tensors
from phi3_lora.adapters.formats.npz import NPZ_NAME
from phi3_lora.adapters.formats.reading import read_source
from phi3_lora.adapters.formats.registry import FILE_FORMATS
from phi3_lora.adapters.names import ends_with, lora_a_name, lora_b_name, magnitude_name, saved_name
from phi3_lora.errors import AdapterError
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import read_model_config
from phi3_lora.storage.safetensors import (
    STORED_AS,
    NewTensor,
    encode,
    from_float32,
    to_float32,
    write_streamed,
)
from tests.tiny import tiny_config

pytest.importorskip("gguf")
LAYOUTS = ("peft", "mlx", "both", "unfused", "loralib", "gguf", "sharded", "npz")
SOURCES_ONLY = ("sharded", "npz")
Draw = st.DrawFn


@st.composite
def models(draw: Draw) -> ModelConfig:
    """Draw a model shape, with or without grouped key-value heads and tied embeddings."""
    groups = draw(st.sampled_from([1, 2, 4]))
    heads = groups * draw(st.integers(1, 2))
    head_dim = 2 * draw(st.integers(1, 4))
    raw = tiny_config(
        vocab_size=draw(st.integers(270, 290)),
        hidden_size=heads * head_dim,
        intermediate_size=draw(st.integers(1, 12)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=heads // groups,
        tie_word_embeddings=draw(st.booleans()),
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return read_model_config(Path(folder))


@st.composite
def adapters(draw: Draw) -> tuple[ModelConfig, Adapter, str]:
    """Draw a model, an adapter for it, and a dtype that holds its numbers exactly."""
    config = draw(models())
    shapes = config.adaptable_shapes()
    use_dora = draw(st.booleans())
    names = [m for m in shapes if not (use_dora and m == "model.embed_tokens")]
    modules = [m for m in names if draw(st.booleans())] or [names[-1]]
    is_uniform = draw(st.booleans())
    default = draw(st.integers(1, 5)), draw(st.sampled_from([1.0, 6.0, 16.5]))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights, alphas = {}, {}

    def stored(*shape: int, least: float = -np.inf) -> Any:
        value = np.maximum(rng.normal(0, 1, shape), least).astype(np.float32)
        return to_float32(from_float32(value, STORED_AS[dtype]), STORED_AS[dtype])

    for module in modules:
        r, alpha = default
        if not is_uniform and draw(st.booleans()):
            r, alpha = draw(st.integers(1, 5)), draw(st.sampled_from([1.0, 2.5, 64.0]))
        out_features, in_features = shapes[module]
        weights[lora_a_name(module)] = stored(r, in_features)
        weights[lora_b_name(module)] = stored(out_features, r)
        if use_dora:
            weights[magnitude_name(module)] = stored(out_features, least=0.5)
        if alpha != default[1]:
            alphas[module] = alpha
    if draw(st.booleans()) and "model.norm" not in modules:
        weights[saved_name("model.norm")] = stored(config.hidden_size)
    adapter = Adapter(
        weights=weights,
        r=default[0],
        lora_alpha=default[1],
        use_rslora=draw(st.booleans()),
        alphas=alphas,
        num_layers=config.num_hidden_layers,
        base_model="base",
    )
    return config, adapter, dtype


def write_source(folder: Path, adapter: Adapter, layout: str, dtype: str) -> None:
    """Write an adapter like another tool; PEFT's file has the dtype of the numbers."""
    folder.mkdir()
    if layout == "npz":
        plain = for_mlx(adapter)
        np.savez(folder / NPZ_NAME, **{n: t.make() for n, t in mlx_tensors(plain).items()})
        (folder / "adapter_config.json").write_text(json.dumps(mlx_config(plain)))
        return
    write_adapter_folder(folder, adapter, to="peft")
    path = folder / "adapter_model.safetensors"
    kind = STORED_AS[dtype]
    tensors = {
        name: NewTensor(kind, value.shape, lambda value=value: from_float32(value, kind))
        for name, value in adapter.weights.items()
    }
    if layout == "peft":
        write_streamed(path, tensors)
        return
    path.unlink()
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file_name = f"adapter_model-{number:05}-of-00002.safetensors"
        write_streamed(folder / file_name, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, file_name)
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def can_hold(layout: str, adapter: Adapter) -> bool:
    if layout in ("peft", "unfused", "both", "sharded"):
        return True
    if adapter.saved:
        return False
    if layout in ("gguf", "loralib", "npz"):
        return not adapter.use_dora
    return not (adapter.use_dora and is_uneven(adapter))


def is_uneven(adapter: Adapter) -> bool:
    """Return whether mlx-lm would also adapt modules that the adapter lacks."""
    return len(for_mlx(dataclasses.replace(adapter, weights=dict(adapter.weights))).modules) != len(
        adapter.modules
    )


def moved(
    source: Path, target: Path, to: str, config: ModelConfig, alpha: float | None = None
) -> Any:
    missing = MissingMetadata(alpha=alpha)
    return convert(
        ConversionRequest(source=source, target=target, to=to, config=config, missing=missing)
    )


def assert_canonical(folder: Path, adapter: Adapter, config: ModelConfig) -> None:
    """Check that all names are fused modules, and that PEFT's config resolves to them."""
    raw = json.loads((folder / "adapter_config.json").read_text())
    found = read_adapter(folder, config)
    check_fits(found, config.adaptable_shapes(), "x", config.tensor_shapes())
    assert set(found.modules) == set(adapter.modules) and set(found.saved) == set(adapter.saved)
    targets = raw["target_modules"]
    everything = [name.removesuffix(".weight") for name in config.tensor_shapes()]
    resolved = {m for m in everything if any(ends_with(m, t) for t in targets)}
    assert resolved == set(found.modules)
    for module in found.modules:
        matching = [
            v for k, v in raw["rank_pattern"].items() if re.match(rf"(.*\.)?({k})$", module)
        ]
        assert (matching or [raw["r"]])[0] == found.rank(module)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    made=adapters(),
    first=st.sampled_from(["peft", "sharded", "npz"]),
    second=st.sampled_from([to for to in LAYOUTS if to not in SOURCES_ONLY]),
    third=st.sampled_from([to for to in LAYOUTS if to not in SOURCES_ONLY]),
)
def test_any_layout_to_any_other_and_back(
    made: tuple[ModelConfig, Adapter, str], first: str, second: str, third: str
) -> None:
    config, adapter, dtype = made
    if not can_hold(first, adapter):
        first = "peft"
    folder = Path(tempfile.mkdtemp())
    try:
        write_source(folder / "s", adapter, first, dtype)
        path = folder / "s"
        alpha = None
        for number, to in enumerate((second, third, "peft")):
            target = folder / f"{number}{'.bin' if to in FILE_FORMATS else ''}"
            if not can_hold(to, adapter):
                with pytest.raises(AdapterError):
                    moved(path, target, to, config, alpha)
                assert not target.exists() and not list(folder.glob(".*"))
                continue
            found = moved(path, target, to, config, alpha)
            # loralib's file has no alpha; the notes of the conversion name it.
            alphas = [
                float(note.rsplit(" ", 1)[-1]) for note in found.notes if "neither rank" in note
            ]
            alpha = alphas[0] if alphas else None
            assert found.max_relative_difference <= SAME, found.worst_module
            path = target
        final = read_adapter(path, config)
        differences = relative_difference(adapter, final)
        assert max(differences.values()) <= SAME, differences
        assert_canonical(path, adapter, config)
    finally:
        shutil.rmtree(folder)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(made=adapters(), seed=st.integers(0, 2**16))
def test_a_file_with_one_number_changed_is_not_the_same_adapter(
    made: tuple[ModelConfig, Adapter, str], seed: int
) -> None:
    """The comparison behind --verify detects a change of one part in 10,000."""
    _, adapter, _ = made
    rng = np.random.default_rng(seed)
    name = sorted(adapter.weights)[rng.integers(len(adapter.weights))]
    changed = adapter.weights[name].copy()
    where = np.unravel_index(np.abs(changed).argmax(), changed.shape)
    changed[where] *= np.float32(1 + 1e-4)
    other = dataclasses.replace(adapter, weights={**adapter.weights, name: changed})
    assert max(relative_difference(adapter, other).values()) > SAME
    assert max(relative_difference(adapter, adapter).values()) == 0.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(made=adapters(), layout=st.sampled_from(["peft", "mlx", "gguf", "loralib"]), data=st.data())
def test_a_damaged_file_is_one_error_and_leaves_the_target_alone(
    made: tuple[ModelConfig, Adapter, str], layout: str, data: st.DataObject
) -> None:
    config, adapter, dtype = made
    if not can_hold(layout, adapter):
        layout = "peft"
    folder = Path(tempfile.mkdtemp())
    try:
        write_source(folder / "s", adapter, "peft", dtype)
        source = folder / "source"
        moved(folder / "s", source, layout, config)
        names = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
        file = source / names[layout] if layout in names else source
        content = bytearray(file.read_bytes())
        kept = data.draw(st.integers(0, len(content) - 1))
        file.write_bytes(bytes(content[:kept]))
        with pytest.raises(AdapterError):
            moved(source, folder / "t", "peft", config, 1.0)
        assert not (folder / "t").exists()
    finally:
        shutil.rmtree(folder)


def test_every_layout_is_detected_by_its_content(tmp_path: Path) -> None:
    shapes = {"model.layers.0.mlp.down_proj": (6, 4)}
    (tmp_path / "m").mkdir()
    raw = tiny_config(
        hidden_size=6, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    (tmp_path / "m/config.json").write_text(json.dumps(raw | {"num_key_value_heads": 1}))
    config = read_model_config(tmp_path / "m")
    weights = {}
    for module, (out_features, in_features) in shapes.items():
        weights[lora_a_name(module)] = np.ones((2, in_features), np.float32)
        weights[lora_b_name(module)] = np.ones((out_features, 2), np.float32)
    adapter = Adapter(weights=weights, r=2, lora_alpha=4.0, num_layers=1)
    write_adapter_folder(tmp_path / "a", adapter)
    for to in ("peft", "mlx", "both", "loralib", "gguf"):
        target = tmp_path / f"{to}.misleading"
        moved(tmp_path / "a", target, to, config)
        _, layout = read_source(target, config, MissingMetadata(alpha=4.0))
        assert layout == {"both": "mlx+peft"}.get(to, to)
    (tmp_path / "text").write_bytes(encode(weights))
    with pytest.raises(AdapterError):
        read_source(tmp_path / "text", config, MissingMetadata(alpha=4.0))
