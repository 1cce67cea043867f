from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.checks import check_fits
from phi3_lora.adapters.convert import ConversionRequest, convert
from phi3_lora.adapters.formats.folder import (
    check_replaceable,
    find_layouts,
    read_adapter,
    write_adapter_folder,
)
from phi3_lora.adapters.inspection import inspect_adapter
from phi3_lora.adapters.names import lora_a_name, lora_b_name, magnitude_name, saved_name
from phi3_lora.errors import AdapterError
from phi3_lora.storage.safetensors import encode, read_all_float32
from tests.tiny import random_adapter, start_weights

PEFT_FILE, MLX_FILE = "adapter_model.safetensors", "adapters.safetensors"
ENDINGS = {
    "self_attn.qkv_proj": (24, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_up_proj": (20, 8),
    "mlp.down_proj": (8, 10),
}
SHAPES = {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in ENDINGS.items()}
QKV = "model.layers.0.self_attn.qkv_proj"


def make_adapter(modules: list[str] | None = None, **changes: Any) -> Adapter:
    shapes = {m: SHAPES[m] for m in modules or SHAPES}
    weights = random_adapter(shapes, r=4, seed=1)
    settings = {"r": 4, "lora_alpha": 6.0, "lora_dropout": 0.05, "num_layers": 3, **changes}
    return Adapter(weights=weights, base_model="base", **settings)


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert set(found.weights) == set(expected.weights)
    for name, value in expected.weights.items():
        assert found.weights[name].dtype == np.float32
        np.testing.assert_array_equal(found.weights[name], value)
    assert found.r == expected.r
    assert found.scaling == pytest.approx(expected.scaling, rel=1e-12)
    assert found.base_model == expected.base_model
    assert found.lora_dropout == expected.lora_dropout


@pytest.mark.parametrize(
    ("to", "files"),
    [("both", {PEFT_FILE, MLX_FILE}), ("peft", {PEFT_FILE}), ("mlx", {MLX_FILE})],
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_written_adapter_reads_back_bit_equal(
    tmp_path: Path, to: str, files: set[str], use_rslora: bool
) -> None:
    adapter = make_adapter(use_rslora=use_rslora)
    assert write_adapter_folder(tmp_path / "a", adapter, to=to) == []
    assert {p.name for p in (tmp_path / "a").iterdir()} == files | {"adapter_config.json"}
    assert_same(read_adapter(tmp_path / "a"), adapter)


def test_layouts_are_transposes_of_each_other(tmp_path: Path) -> None:
    adapter = make_adapter()
    write_adapter_folder(tmp_path / "a", adapter)
    stored = read_all_float32(tmp_path / "a" / MLX_FILE, AdapterError)
    np.testing.assert_array_equal(stored[f"{QKV}.lora_a"], adapter.weights[lora_a_name(QKV)].T)
    np.testing.assert_array_equal(stored[f"{QKV}.lora_b"], adapter.weights[lora_b_name(QKV)].T)
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert raw["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert (raw["r"], raw["lora_alpha"], raw["num_layers"]) == (4, 6, 3)
    assert raw["lora_parameters"]["scale"] == 1.5
    assert raw["lora_parameters"]["keys"] == sorted(ENDINGS)


def test_layout_is_told_by_content_and_not_by_name(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter(), to="peft")
    (tmp_path / "a" / PEFT_FILE).rename(tmp_path / "a" / MLX_FILE)
    assert set(find_layouts(tmp_path / "a")) == {"peft"}
    assert_same(read_adapter(tmp_path / "a"), make_adapter())


def edit_file(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = read_all_float32(folder / name, AdapterError)
    change(tensors)
    (folder / name).write_bytes(encode(tensors))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "DELETE"}))


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_adapter_folder(folder, make_adapter())
    edit_file(folder, MLX_FILE, lambda t: t[f"{QKV}.lora_a"].__imul__(np.float32(1 + 2**-23)))
    with pytest.raises(AdapterError) as problem:
        read_adapter(folder)
    assert f"{lora_a_name(QKV)}: different values" in str(problem.value)


def test_scales_that_disagree_are_refused(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter())
    edit_config(tmp_path / "a", lora_alpha=12)
    with pytest.raises(AdapterError, match=r"scale 3 \(PEFT\) against 1.5 \(mlx-lm\)"):
        read_adapter(tmp_path / "a")


def test_module_in_one_file_only_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_adapter_folder(folder, make_adapter())
    edit_file(folder, MLX_FILE, lambda t: (t.pop(f"{QKV}.lora_a"), t.pop(f"{QKV}.lora_b")))
    with pytest.raises(AdapterError, match="only in the PEFT file"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda t: t.pop(lora_b_name(QKV)), f"its pair {lora_b_name(QKV)} is missing"),
        (lambda t: t.pop(lora_a_name(QKV)), f"its pair {lora_a_name(QKV)} is missing"),
        (lambda t: t[lora_a_name(QKV)].__setitem__((0, 0), np.nan), "holds NaN or infinity"),
        (lambda t: t[lora_b_name(QKV)].__setitem__((0, 0), np.inf), "holds NaN or infinity"),
        (
            lambda t: t.update({lora_a_name(QKV): np.ones((5, 8), np.float32)}),
            "shape (5, 8) does not hold rank 4",
        ),
        (
            lambda t: t.update({lora_a_name(QKV): np.ones(4, np.float32)}),
            "shape (4,) does not hold rank 4",
        ),
        (lambda t: t.update({"lm_head.weight": np.ones(4, np.float32)}), "lm_head.weight: not a"),
    ],
)
def test_damaged_tensor_is_named(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], Any], phrase: str
) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter(), to="peft")
    edit_file(tmp_path / "a", PEFT_FILE, change)
    with pytest.raises(AdapterError) as problem:
        read_adapter(tmp_path / "a")
    assert phrase in str(problem.value)


@pytest.mark.parametrize("name", [PEFT_FILE, MLX_FILE])
@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_file_is_named(tmp_path: Path, name: str, kept: int) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter())
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(AdapterError) as problem:
        read_adapter(tmp_path / "a")
    assert str(path) in str(problem.value)


@pytest.mark.parametrize(
    ("to", "changes", "phrase"),
    [
        ("peft", {"r": "DELETE"}, "r must be an integer >= 1, got None"),
        ("peft", {"r": 0}, "r must be an integer >= 1, got 0"),
        ("peft", {"r": 8}, "does not hold rank 8"),
        ("peft", {"lora_alpha": "DELETE"}, "lora_alpha must be a number, got None"),
        ("peft", {"use_dora": True}, "there are no lora_magnitude_vector tensors"),
        ("peft", {"modules_to_save": ["lm_head"]}, "'lm_head', whose weight is not there"),
        ("peft", {"rank_pattern": {"o_proj": 2}}, "does not hold rank 2"),
        ("mlx", {"fine_tune_type": "dora"}, "only dora has .m beside"),
        ("mlx", {"fine_tune_type": "full"}, "fine_tune_type 'full' is not supported"),
        ("mlx", {"lora_parameters": "DELETE"}, "lora_parameters needs rank and scale"),
        ("mlx", {"lora_parameters": {"rank": 4}}, "lora_parameters needs rank and scale"),
        ("mlx", {"lora_parameters": {"rank": 8, "scale": 1.0}}, "does not hold rank 8"),
    ],
)
def test_config_that_cannot_be_used_is_refused(
    tmp_path: Path, to: str, changes: dict[str, Any], phrase: str
) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter(), to=to)
    edit_config(tmp_path / "a", **changes)
    with pytest.raises(AdapterError) as problem:
        read_adapter(tmp_path / "a")
    assert phrase in str(problem.value)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_bad_adapter_config_is_an_adapter_error(tmp_path: Path, content: str | None) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter())
    path = tmp_path / "a" / "adapter_config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("key", "value", "phrase"),
    [
        ("r", True, "r must be an integer"),
        ("lora_alpha", True, "lora_alpha must be a number"),
        ("peft_type", "IA3", "peft_type must be LORA"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa' is not supported"),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens"),
    ],
)
def test_bad_value_in_the_adapter_config_is_named(
    tmp_path: Path, key: str, value: Any, phrase: str
) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter(), to="peft")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(AdapterError, match=phrase):
        read_adapter(tmp_path / "a")


def test_conversion_to_mlx_tells_that_the_number_of_layers_is_unknown(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter(), to="peft")
    assert (
        "pass --model"
        in convert(ConversionRequest(source=tmp_path / "a", target=tmp_path / "b", to="mlx")).notes[
            0
        ]
    )


def test_an_adapter_is_not_written_over_other_files(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter())
    check_replaceable(tmp_path / "a")
    check_replaceable(tmp_path / "new")
    (tmp_path / "a" / "config.yaml").write_text("")
    with pytest.raises(AdapterError, match="holds other files"):
        check_replaceable(tmp_path / "a")


def test_conversion_into_the_source_is_refused(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter())
    with pytest.raises(AdapterError, match="is inside"):
        convert(ConversionRequest(source=tmp_path / "a", target=tmp_path / "a" / "b", to="peft"))
    assert not (tmp_path / "a" / "b").exists()


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such adapter folder"):
        read_adapter(tmp_path / "x")
    with pytest.raises(AdapterError, match="holds no adapter"):
        read_adapter(tmp_path)


NOT_THE_LAST = [m for m in SHAPES if ".2." not in m]
UNEVEN = [m for m in SHAPES if ".0." not in m][1:]


@pytest.mark.parametrize(
    ("modules", "num_layers"),
    [(NOT_THE_LAST, 3), ([m for m in SHAPES if ".1." not in m], 3), (UNEVEN, 2)],
)
def test_layers_that_mlx_would_adapt_too_are_filled_with_zeros(
    tmp_path: Path, modules: list[str], num_layers: int
) -> None:
    adapter = make_adapter(modules)
    assert write_adapter_folder(tmp_path / "a", adapter, to="mlx") == []
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert raw["num_layers"] == num_layers
    stored = read_all_float32(tmp_path / "a" / MLX_FILE, AdapterError)
    filled = [n for n, v in stored.items() if n.endswith("lora_a") and not v.any()]
    keys = raw["lora_parameters"]["keys"]
    assert len(filled) == num_layers * len(keys) - len(modules)
    assert_same(read_adapter(tmp_path / "a"), adapter)


def with_magnitudes(adapter: Adapter) -> Adapter:
    rng = np.random.default_rng(0)
    sizes = {magnitude_name(m): len(adapter.pair(m)[1]) for m in adapter.modules}
    new = {name: rng.uniform(0.5, 2.0, size).astype(np.float32) for name, size in sizes.items()}
    return dataclasses.replace(adapter, weights={**adapter.weights, **new})


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (with_magnitudes(make_adapter(NOT_THE_LAST)), "and it uses DoRA"),
        (
            dataclasses.replace(
                make_adapter(),
                weights={
                    **make_adapter().weights,
                    saved_name("model.norm"): np.ones(8, np.float32),
                },
            ),
            r"it holds whole weights \(model.norm\)",
        ),
    ],
)
def test_what_mlx_cannot_hold_is_told(tmp_path: Path, adapter: Adapter, reason: str) -> None:
    notes = write_adapter_folder(tmp_path / "a", adapter)
    assert len(notes) == 1 and re.search(reason, notes[0])
    assert not (tmp_path / "a" / MLX_FILE).exists()
    assert_same(read_adapter(tmp_path / "a"), adapter)
    with pytest.raises(AdapterError, match=reason):
        write_adapter_folder(tmp_path / "b", adapter, to="mlx")
    assert not (tmp_path / "b").exists()


def test_magnitudes_are_mlx_lms_m(tmp_path: Path) -> None:
    adapter = with_magnitudes(make_adapter())
    assert write_adapter_folder(tmp_path / "a", adapter) == []
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert raw["fine_tune_type"] == "dora" and raw["use_dora"] is True
    stored = read_all_float32(tmp_path / "a" / MLX_FILE, AdapterError)
    np.testing.assert_array_equal(stored[f"{QKV}.m"], adapter.weights[magnitude_name(QKV)])
    for layout in (PEFT_FILE, MLX_FILE):
        (tmp_path / "a" / layout).rename(tmp_path / layout)
        assert_same(read_adapter(tmp_path / "a"), adapter)
        (tmp_path / layout).rename(tmp_path / "a" / layout)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda t: t.pop(magnitude_name(QKV)), "its DoRA magnitude is missing"),
        (lambda t: t.update({magnitude_name(QKV): np.ones(3, np.float32)}), "B has 24 rows"),
        (lambda t: t.pop(lora_a_name(QKV)) is t.pop(lora_b_name(QKV)), "a magnitude without A"),
    ],
)
def test_a_damaged_magnitude_is_named(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], Any], phrase: str
) -> None:
    write_adapter_folder(tmp_path / "a", with_magnitudes(make_adapter()), to="peft")
    edit_file(tmp_path / "a", PEFT_FILE, change)
    with pytest.raises(AdapterError, match=phrase):
        read_adapter(tmp_path / "a")


def test_tail_of_layers_is_written_for_mlx(tmp_path: Path) -> None:
    adapter = make_adapter([m for m in SHAPES if ".0." not in m])
    assert write_adapter_folder(tmp_path / "a", adapter) == []
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert raw["num_layers"] == 2
    assert raw["target_modules"] == list(adapter.modules)
    assert_same(read_adapter(tmp_path / "a"), adapter)


@pytest.mark.parametrize(("source", "to"), [("peft", "mlx"), ("mlx", "peft"), ("mlx", "both")])
def test_conversion_is_exact(tmp_path: Path, source: str, to: str) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter(), to=source)
    found = convert(ConversionRequest(source=tmp_path / "a", target=tmp_path / "b", to=to))
    assert found.lossless and found.max_weight_difference == 0.0
    assert (found.source, found.to, found.tensors) == (source, to, 24)
    assert_same(read_adapter(tmp_path / "b"), make_adapter())


def test_conversion_into_a_used_folder_is_refused(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "a", make_adapter())
    with pytest.raises(AdapterError, match="is in use"):
        convert(ConversionRequest(source=tmp_path / "a", target=tmp_path / "a", to="peft"))


def test_delta_norm_is_the_deltas_frobenius_norm(tmp_path: Path) -> None:
    adapter = make_adapter()
    adapter.weights[lora_b_name(QKV)][:] = 0.0
    write_adapter_folder(tmp_path / "a", adapter)
    facts = inspect_adapter(tmp_path / "a").to_dict()
    for module in SHAPES:
        expected = np.linalg.norm(adapter.delta(module).astype(np.float64))
        assert facts["delta_norms"][module] == pytest.approx(expected, rel=1e-6)
    assert facts["no_op_modules"] == [QKV]
    assert facts["layout"] == "mlx+peft" and facts["layers"] == [0, 1, 2]
    assert facts["num_parameters"] == sum(4 * (o + i) for o, i in SHAPES.values())


def test_start_is_zero_delta_and_bounded() -> None:
    weights = start_weights(SHAPES, r=4, seed=0)
    adapter = dataclasses.replace(make_adapter(), weights=weights)
    check_fits(adapter, SHAPES, "start")
    for module, (_, in_features) in SHAPES.items():
        a = weights[lora_a_name(module)]
        assert 0.5 * in_features**-0.5 < np.abs(a).max() <= in_features**-0.5
        assert not weights[lora_b_name(module)].any()
    one = start_weights({QKV: SHAPES[QKV]}, r=4, seed=0)
    np.testing.assert_array_equal(one[lora_a_name(QKV)], weights[lora_a_name(QKV)])


def test_adapter_of_another_model_is_refused() -> None:
    shapes = {m: (o, i + 1) if m == QKV else (o, i) for m, (o, i) in SHAPES.items()}
    del shapes["model.layers.2.mlp.down_proj"]
    with pytest.raises(AdapterError) as problem:
        check_fits(make_adapter(), shapes, "x")
    assert f"{QKV}: A is (4, 8), the base model needs (r, 9)" in str(problem.value)
    assert "model.layers.2.mlp.down_proj: the base model has no such" in str(problem.value)
