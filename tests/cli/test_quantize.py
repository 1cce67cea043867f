"""The command quantize and the option --quantize: contract, cache, identity and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.engine.registry import load_backend
from phi3_lora.errors import ModelError
from phi3_lora.inference.base_model import find_base_model
from phi3_lora.inference.loading import check_for_backend
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.quantization.cache import cache_dir
from phi3_lora.models.quantization.folder import MLX_FILE, read_grid
from phi3_lora.models.weights import check_weights, model_identity, tensor_index
from phi3_lora.storage.safetensors import encode, read_header, read_raw
from tests.cli.test_contract import Capture, run, run_json
from tests.tiny import chat, write_model, write_rows


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "d.jsonl", [chat("hi", "hello")] * 4)


def identity(folder: Path) -> str:
    return model_identity(folder, tensor_index(folder, read_model_config(folder)))


def test_json_names_the_folder_and_its_error(capsys: Capture, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "q"
    found = run_json(capsys, "quantize", "--model", model, "--output", target)
    assert found["path"] == str(target) and found["bits"] == 4
    assert 0.05 < found["error"] <= found["worst_error"] < 0.12
    assert found["worst_module"] in read_model_config(model).linear_shapes()
    check_weights(target, read_model_config(target))
    eight = run_json(
        capsys, "quantize", "--model", model, "--output", tmp_path / "e", "--bits", "8"
    )
    assert eight["error"] < 0.01


def test_the_flag_makes_the_same_base_once(
    capsys: Capture, model: Path, data: Path, tmp_path: Path
) -> None:
    target = tmp_path / "q"
    run_json(capsys, "quantize", "--model", model, "--output", target)
    arguments = ["evaluate", "--data", data, "--device", "cpu", "--backend", "cuda", "--json"]
    with_flag = [*arguments, "--model", model, "--quantize", "4bit"]
    code, first, err = run(capsys, *with_flag)
    assert code == 0 and "quantising" in err
    code, second, err = run(capsys, *with_flag)
    assert code == 0 and "quantising" not in err
    folder = run_json(capsys, *arguments[:-1], "--model", target)
    assert json.loads(first) == json.loads(second) == folder
    (made,) = (p for p in cache_dir().iterdir() if p.is_dir() and identity(p) == identity(target))
    assert not (made / "transformers.safetensors").exists()


def test_an_adapter_tells_its_base(
    capsys: Capture, model: Path, data: Path, tmp_path: Path
) -> None:
    train = ["train", "--model", model, "--data", data, "--max-steps", "2", "--device", "cpu"]
    train += ["--backend", "cuda", "--set", "training_config.warmup_ratio=0"]
    run_json(capsys, *train, "--quantize", "8bit", "--output", tmp_path / "r")
    adapter = tmp_path / "r/adapter"
    assert "| Quantised | `8bit` |" in (adapter / "README.md").read_text()
    evaluate = ["evaluate", "--model", model, "--adapter", adapter, "--data", data]
    evaluate += ["--device", "cpu", "--backend", "cuda"]
    _, _, same = run(capsys, *evaluate, "--quantize", "8bit")
    _, _, other = run(capsys, *evaluate, "--quantize", "4bit")
    assert "another base model" not in same and "another base model" in other
    _, _, started = run(capsys, *train, "--adapter", adapter, "--output", tmp_path / "s")
    assert "another base model" in started


@pytest.mark.parametrize(
    ("backend", "quantize"), [("mlx", "nf4"), ("cuda", "mlx-affine")], ids=["mlx", "cuda"]
)
def test_the_other_backends_own_quantisation_is_refused(
    capsys: Capture, model: Path, data: Path, backend: str, quantize: str
) -> None:
    code, _, err = run(
        *(capsys, "evaluate", "--model", model, "--data", data, "--backend", backend),
        *("--device", "cpu", "--quantize", quantize),
    )
    assert code == 2 and f"--quantize {quantize}" in err and "4bit, 8bit" in err


def test_refusals_leave_the_target_alone(capsys: Capture, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "q"
    run_json(capsys, "quantize", "--model", model, "--output", target)
    code, _, err = run(capsys, "quantize", "--model", model, "--output", target)
    assert code == 2 and "already holds" in err
    code, _, err = run(capsys, "quantize", "--model", target, "--output", tmp_path / "again")
    assert code == 2 and "quantised already" in err and not (tmp_path / "again").exists()
    odd = write_model(tmp_path / "odd", hidden_size=72, intermediate_size=72)
    code, _, err = run(capsys, "quantize", "--model", odd, "--output", tmp_path / "o")
    assert code == 2 and "multiple of 32" in err and not (tmp_path / "o").exists()
    code, _, err = run(
        *(capsys, "parity", "--model", target, "--quantize", "8bit", "--device", "cpu")
    )
    assert code == 2 and "quantised already" in err


def test_words_that_the_backends_would_read_differently_are_refused(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "q"
    run_json(capsys, "quantize", "--model", model, "--output", target)
    tensors = read_header(target / MLX_FILE, ModelError)
    module = "model.layers.0.mlp.down_proj"
    arrays = {n: np.array(read_raw(i)) for n, i in tensors.items() if i.dtype != "BF16"}
    for name, info in tensors.items():
        if info.dtype == "BF16":
            arrays[name] = (np.array(read_raw(info)).astype(np.uint32) << 16).view(np.float32)
    arrays[f"{module}.biases"] += 1.0
    del arrays["model.layers.1.mlp.down_proj.scales"]
    (target / MLX_FILE).write_bytes(encode(arrays))
    with pytest.raises(ModelError) as caught:
        check_weights(target, read_model_config(target))
    assert f"{module}.biases" in str(caught.value)
    assert "missing: model.layers.1.mlp.down_proj.scales" in str(caught.value)


def test_a_grid_is_read_back_unchanged(capsys: Capture, model: Path, tmp_path: Path) -> None:
    run_json(capsys, "quantize", "--model", model, "--output", tmp_path / "q")
    grid = read_grid(
        read_header(tmp_path / "q" / MLX_FILE, ModelError), "model.layers.0.mlp.down_proj"
    )
    assert grid.words.shape == (64, 96 * 4 // 32) and grid.scales.shape == (64, 3)


def evaluated(capsys: Capture, model: Path, data: Path) -> tuple[float, str]:
    code, out, err = run(
        *(capsys, "evaluate", "--model", model, "--data", data, "--quantize", "4bit"),
        *("--device", "cpu", "--backend", "cuda", "--json"),
    )
    assert code == 0, err
    return json.loads(out)["loss"], err


def test_weights_that_differ_outside_the_sample_are_quantised_again(
    capsys: Capture, model: Path, data: Path, tmp_path: Path
) -> None:
    first, _ = evaluated(capsys, model, data)
    path = model / "model.safetensors"
    info = read_header(path, ModelError)["model.layers.0.mlp.gate_up_proj.weight"]
    raw = bytearray(path.read_bytes())
    raw[info.offset + 4000 : info.offset + 20_000] = bytes(16_000)
    path.write_bytes(bytes(raw))
    second, err = evaluated(capsys, model, data)
    assert second != first and "quantising" in err


def test_a_damaged_cache_is_replaced_and_a_whole_one_may_be_read_only(
    capsys: Capture, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, _ = evaluated(capsys, model, data)
    (made,) = (p for p in cache_dir().iterdir() if p.is_dir())
    for damage in (
        lambda: (made / MLX_FILE).write_bytes((made / MLX_FILE).read_bytes()[:-100]),
        lambda: (made / "config.json").unlink(),
    ):
        damage()
        again, err = evaluated(capsys, model, data)
        assert again == first and "quantising" in err
    monkeypatch.setattr("fcntl.flock", None)
    assert evaluated(capsys, model, data)[0] == first


def test_a_cache_that_cannot_be_written_names_the_way_out(
    capsys: Capture, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    code, _, err = run(
        *(capsys, "evaluate", "--model", model, "--data", data, "--quantize", "4bit"),
        *("--device", "cpu", "--backend", "cuda"),
    )
    assert code == 2 and "XDG_CACHE_HOME" in err and "quantize --output" in err


@pytest.mark.parametrize(("backend", "own"), [("cuda", "nf4"), ("mlx", "mlx-affine")])
def test_a_backends_own_quantisation_is_another_base_and_needs_an_unquantised_one(
    capsys: Capture, model: Path, tmp_path: Path, backend: str, own: str
) -> None:
    chosen = load_backend(backend)
    plain, named = (
        check_for_backend(find_base_model(str(model), quantize=q), chosen, print).identity
        for q in ("none", own)
    )
    assert named == f"{plain}-{own}"
    run_json(capsys, "quantize", "--model", model, "--output", tmp_path / "q")
    with pytest.raises(ModelError, match="quantised already"):
        check_for_backend(find_base_model(str(tmp_path / "q"), quantize=own), chosen, print)


def test_mlx_affine_leaves_layers_dense_that_its_groups_do_not_divide(
    capsys: Capture, model: Path, data: Path
) -> None:
    found = run_json(
        *(capsys, "evaluate", "--model", model, "--data", data, "--quantize", "mlx-affine"),
        *("--device", "cpu", "--backend", "mlx"),
    )
    assert found["loss"] > 0
