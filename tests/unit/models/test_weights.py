from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.errors import ModelError
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import check_weights, model_identity, num_parameters, tensor_index
from phi3_lora.storage.safetensors import (
    encode,
    is_finite,
    read_all_float32,
    read_float32,
    read_header,
    read_parts,
)
from tests.tiny import write_model

Tensors = dict[str, np.ndarray]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def check(folder: Path) -> None:
    check_weights(folder, read_model_config(folder))


def identity(folder: Path) -> str:
    return model_identity(folder, tensor_index(folder, read_model_config(folder)))


def test_good_weights_pass(model: Path) -> None:
    check(model)
    config = read_model_config(model)
    held = sum(
        int(np.prod(t.shape)) for t in tensor_index(model, read_model_config(model)).values()
    )
    assert held == num_parameters(config)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:7],
        lambda data: (2**60).to_bytes(8, "little") + data[8:],
        lambda data: b"<!DOCTYPE html><html><body>Not found</body></html>" * 20,
        lambda data: data + b"\0",
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["short", "half", "empty", "stub", "huge-header", "html", "long", "bad-json", "lfs"],
)
def test_damaged_file_is_named(model: Path, damage: Callable[[bytes], bytes]) -> None:
    path = model / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError) as problem:
        check(model)
    assert str(path) in str(problem.value)


def test_header_that_lies_about_a_shape_is_named(model: Path) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    assert b'"shape":[64,96]' in data
    path.write_bytes(data.replace(b'"shape":[64,96]', b'"shape":[64,97]'))
    with pytest.raises(ModelError, match="down_proj"):
        check(model)


def rename(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.down.weight"] = tensors.pop(DOWN)


def put(index: tuple[int, ...], value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[DOWN].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "phrases"),
    [
        (lambda t: t.pop(DOWN), [f"missing: {DOWN} (64, 96)"]),
        (lambda t: t.update({DOWN: t[DOWN].T}), [f"wrong shape: {DOWN} is (96, 64)"]),
        (lambda t: t.update({"x.weight": np.zeros(2, np.float32)}), ["extra: x.weight (2,)"]),
        (put((0, 0), np.nan), [f"not finite: {DOWN}"]),
        (put((63, 95), np.inf), [f"not finite: {DOWN}"]),
        (put((5, 5), -np.inf), [f"not finite: {DOWN}"]),
        (rename, [f"missing: {DOWN}", "extra: model.layers.1.mlp.down.weight"]),
    ],
    ids=["missing", "transposed", "extra", "nan", "inf", "-inf", "renamed"],
)
def test_bad_tensor_is_named(
    model: Path, change: Callable[[Tensors], None], phrases: list[str]
) -> None:
    path = model / "model.safetensors"
    tensors = read_all_float32(path, ModelError)
    change(tensors)
    path.write_bytes(encode(tensors))
    with pytest.raises(ModelError) as problem:
        check(model)
    lines = str(problem.value).splitlines()
    assert len(lines) == 1 + len(phrases)
    for line, phrase in zip(lines[1:], phrases, strict=True):
        assert phrase in line


def test_rotary_buffers_of_old_exports_are_accepted(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = read_all_float32(path, ModelError)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    path.write_bytes(encode(tensors))
    check(model)


def shard(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, target)
    tensors = read_all_float32(folder / "model.safetensors", ModelError)
    weight_map = {}
    for i in range(2):
        part = {name: tensors[name] for name in sorted(tensors)[i::2]}
        (target / f"model-{i}.safetensors").write_bytes(encode(part))
        weight_map.update(dict.fromkeys(part, f"model-{i}.safetensors"))
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def test_identity_is_independent_of_path_and_shards(model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "again"
    shutil.copytree(model, moved)
    sharded = shard(model, tmp_path / "sharded")
    check(sharded)
    assert identity(model) == identity(moved) == identity(sharded)


def test_identity_ignores_who_wrote_the_config(model: Path) -> None:
    before = identity(model)
    raw = json.loads((model / "config.json").read_text())
    raw |= {"_name_or_path": "/home/x", "transformers_version": "9", "auto_map": {}}
    (model / "config.json").write_text(json.dumps(raw))
    assert identity(model) == before


def test_identity_changes_with_weights_and_config(model: Path, tmp_path: Path) -> None:
    others = [
        write_model(tmp_path / "a", seed=1),
        write_model(tmp_path / "b", rms_norm_eps=1e-6),
    ]
    assert len({identity(model), *map(identity, others)}) == 3


def test_shard_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    sharded = shard(model, tmp_path / "sharded")
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no such file: .*model-1\.safetensors"):
        check(sharded)


def test_shard_outside_the_folder_is_refused(model: Path, tmp_path: Path) -> None:
    sharded = shard(model, tmp_path / "sharded")
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-1", "../model/part-1"))
    with pytest.raises(ModelError, match="outside its folder"):
        check(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "["])
def test_bad_shard_index_is_named(model: Path, tmp_path: Path, content: str) -> None:
    sharded = shard(model, tmp_path / "sharded")
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json"):
        check(sharded)


def test_folder_without_weights_says_what_to_do(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="must be converted to safetensors"):
        check(model)


def write_bfloat16(path: Path, bits: list[int]) -> None:
    entry = {"dtype": "BF16", "shape": [len(bits)], "data_offsets": [0, 2 * len(bits)]}
    header = json.dumps({"x": entry}).encode()
    data = np.array(bits, dtype="<u2").tobytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_bfloat16(path, [0x3F80, 0xC040, 0x0001, 0x7F7F])
    found = read_float32(read_header(path, ModelError)["x"])
    assert found.tolist() == [1.0, -3.0, 2.0**-133, float(np.float32(3.3895313892515355e38))]


@pytest.mark.parametrize(
    ("bits", "is_good"),
    [([0x3F80], True), ([0x7F7F], True), ([0x7F80], False), ([0xFFC0], False)],
)
def test_bfloat16_finiteness(tmp_path: Path, bits: list[int], is_good: bool) -> None:
    write_bfloat16(tmp_path / "x.safetensors", bits)
    assert is_finite(read_header(tmp_path / "x.safetensors", ModelError)["x"]) == is_good


def test_parts_are_the_whole_tensor(tmp_path: Path) -> None:
    value = np.arange(21, dtype=np.float32).reshape(3, 7)
    (tmp_path / "x.safetensors").write_bytes(encode({"a": value[:1], "x": value}))
    info = read_header(tmp_path / "x.safetensors", ModelError)["x"]
    parts = list(read_parts(info, size=8))
    assert [len(part) for part in parts] == [8, 8, 5]
    assert np.array_equal(np.concatenate(parts).reshape(3, 7), value)
