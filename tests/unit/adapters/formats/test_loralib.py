"""loralib files: as loralib and torch write and read them, and what hostile ones may not do."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.convert import ConversionRequest, convert
from phi3_lora.adapters.formats.folder import read_adapter, write_adapter_folder
from phi3_lora.adapters.formats.loralib import from_loralib
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.torch_pickle import encode_torch_file, read_torch_file
from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.errors import AdapterError
from phi3_lora.models.config import PROJECTIONS
from phi3_lora.models.config_json import read_model_config
from tests.cli.test_contract import Capture, run, run_json
from tests.tiny import random_adapter, write_model

torch = pytest.importorskip("torch")
SHAPES = {
    f"model.layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in zip(PROJECTIONS, [(192, 64), (64, 64), (192, 64), (64, 96)], strict=True)
}


def adapter_of(**changes: object) -> Adapter:
    weights = random_adapter(SHAPES, r=4)
    return Adapter(weights=weights, r=4, lora_alpha=8.0, num_layers=2, **changes)


def test_torch_reads_what_we_write_and_we_read_what_torch_writes(tmp_path: Path) -> None:
    value = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {"a.lora_A": value.numpy(), "b": np.float32([1.5])}
    (tmp_path / "ours.pt").write_bytes(encode_torch_file(tensors))
    loaded = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert list(loaded) == list(tensors)
    assert all(np.array_equal(loaded[n].numpy(), v) for n, v in tensors.items())
    state = {
        "plain": value,
        "view": value[1:, ::2],
        "transposed": value.T,
        "tied": value,
        "half": value.half(),
        "bfloat16": value.bfloat16(),
        "double": value.double(),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(value),
    }
    torch.save(state, tmp_path / "torch.pt")
    found = read_torch_file(tmp_path / "torch.pt")
    assert list(found) == list(state)
    for name, expected in state.items():
        assert np.array_equal(found[name], expected.detach().float().numpy()), name


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch owned",)


def archive_of(content: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=protocol))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        archive_of({"x.lora_A": _Evil()}),
        archive_of({"x": eval}),
        archive_of([1, 2]),
        archive_of({"x": 3}),
        b"",
        b"PK\x03\x04 not an archive",
        encode_torch_file({"a": np.zeros((64, 64), np.float32)})[:-900],
        encode_torch_file({"a": np.zeros((8, 8), np.float32)}).replace(
            b"J" + (8).to_bytes(4, "little"), b"J" + (99).to_bytes(4, "little"), 1
        ),
    ],
    ids=["os.system", "eval", "list", "number", "empty", "no zip", "truncated", "lying size"],
)
def test_a_hostile_or_damaged_file_is_one_error_and_runs_nothing(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=r"x\.pt"):
        read_torch_file(path)
    assert not (tmp_path / "owned").exists()


def test_tensors_larger_than_their_storage_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(10**6)}, tmp_path / "x.pt")
    with pytest.raises(AdapterError, match="larger than its storage"):
        read_torch_file(tmp_path / "x.pt")
    value = torch.zeros(4)
    torch.save({str(i): value[:] for i in range(100)}, tmp_path / "y.pt")
    with pytest.raises(AdapterError, match="more than 8 tensors"):
        read_torch_file(tmp_path / "y.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    with pytest.raises(AdapterError, match="compressed"):
        read_torch_file(tmp_path / "x.pt")


def test_convert_there_and_back_is_exact(capsys: Capture, tmp_path: Path) -> None:
    adapter = adapter_of()
    write_adapter_folder(tmp_path / "a", adapter)
    found = convert(
        ConversionRequest(source=tmp_path / "a", target=tmp_path / "x.pt", to="loralib")
    )
    assert found.lossless and "lora_alpha 8" in found.notes[0]
    code, _, err = run(capsys, "convert", tmp_path / "x.pt", tmp_path / "b", "--to", "peft")
    assert code == 2 and "--alpha" in err and not (tmp_path / "b").exists()
    back = run_json(
        *(capsys, "convert", tmp_path / "x.pt", tmp_path / "b", "--to", "both"),
        *("--alpha", "8"),
    )
    assert back["from"] == "loralib" and back["lossless"]
    again = read_adapter(tmp_path / "b")
    assert again.scaling == adapter.scaling
    assert all(np.array_equal(again.weights[n], v) for n, v in adapter.weights.items())
    code, _, err = run(capsys, "convert", tmp_path / "a", tmp_path / "x.pt", "--to", "loralib")
    assert code == 2 and "exists already" in err
    code, _, err = run(
        *(capsys, "convert", tmp_path / "x.pt", tmp_path / "c", "--to", "peft"),
        *("--alpha", "8", "--enable", "q,w"),
    )
    assert code == 2 and "allowed are q, k, v, gate, up" in err


def test_ranks_and_scales_of_their_own_become_one_alpha(tmp_path: Path) -> None:
    adapter = adapter_of()
    first = adapter.modules[0]
    a, b = adapter.pair(first)
    wide = {lora_a_name(first): np.tile(a, (2, 1)), lora_b_name(first): np.tile(b, (1, 2))}
    adapter = dataclasses.replace(
        adapter, weights={**adapter.weights, **wide}, alphas={adapter.modules[1]: 2.0}
    )
    write_adapter_folder(tmp_path / "a", adapter)
    found = convert(
        ConversionRequest(source=tmp_path / "a", target=tmp_path / "x.pt", to="loralib")
    )
    assert found.max_relative_difference <= 1e-6
    assert "r is 8, lora_alpha 16" in found.notes[0]


@pytest.mark.parametrize("enable", [[True, False, True], [True, True, True]])
def test_state_dicts_of_loralib_itself_give_its_own_deltas(
    tmp_path: Path, enable: list[bool]
) -> None:
    lora = pytest.importorskip("loralib")

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = lora.MergedLinear(64, 192, r=3, lora_alpha=6, enable_lora=enable)
            self.o_proj = lora.Linear(64, 64, r=3, lora_alpha=6)

    layer = Layer()
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    state = {
        f"net.model.layers.0.self_attn.{name}": value
        for name, value in lora.lora_state_dict(layer).items()
    }
    torch.save(state, tmp_path / "x.pt")
    missing = MissingMetadata(6.0, "net.", ("q", "v"))
    if all(enable):
        missing = MissingMetadata(6.0, "net.")
    adapter = from_loralib(read_torch_file(tmp_path / "x.pt"), missing, "x.pt")
    x = torch.randn(5, 64)
    for name in ("qkv_proj", "o_proj"):
        module = getattr(layer, name)
        with torch.no_grad():
            plain = torch.nn.functional.linear(x, module.weight, module.bias)
            expected = (module(x) - plain).numpy()
        found = x.numpy() @ adapter.delta(f"model.layers.0.self_attn.{name}").T
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_an_embedding_of_loralib_is_the_models(tmp_path: Path) -> None:
    lora = pytest.importorskip("loralib")
    embedding = lora.Embedding(264, 64, r=3, lora_alpha=6)
    torch.nn.init.normal_(embedding.lora_A)
    state = {f"model.embed_tokens.{n}": v for n, v in lora.lora_state_dict(embedding).items()}
    torch.save(state, tmp_path / "x.pt")
    found = convert(
        ConversionRequest(
            source=tmp_path / "x.pt", target=tmp_path / "a", to="both", missing=MissingMetadata(6.0)
        )
    )
    assert found.lossless
    adapter = read_adapter(tmp_path / "a")
    ids = torch.arange(264)
    with torch.no_grad():
        expected = (embedding(ids) - torch.nn.functional.embedding(ids, embedding.weight)).numpy()
    np.testing.assert_allclose(adapter.delta("model.embed_tokens").T, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("enable", "rows", "parts", "expected"),
    [
        # 64 rows of q, 32 of k and v: loralib's equal parts are 128 / 3, which it refuses.
        (("q", "v"), 96, None, [(0, 64), (96, 128)]),
        (("k", "v"), 64, None, [(64, 96), (96, 128)]),
        (("q", "k", "v"), 128, "model", [(0, 64), (64, 96), (96, 128)]),
    ],
)
def test_unequal_parts_are_told_by_their_rows(
    tmp_path: Path, enable: tuple[str, ...], rows: int, parts: str | None, expected: list
) -> None:
    config = read_model_config(write_model(tmp_path / "m", num_key_value_heads=2))
    qkv = "model.layers.0.self_attn.qkv_proj"
    rng = np.random.default_rng(0)
    a = rng.normal(0, 1, (2 * len(enable), 64)).astype(np.float32)
    b = rng.normal(0, 1, (rows, 2)).astype(np.float32)
    tensors = {f"{qkv}.lora_A": a, f"{qkv}.lora_B": b}
    adapter = from_loralib(tensors, MissingMetadata(4.0, "", enable, parts), "x.pt", config)
    delta = adapter.delta(qkv)
    used = 0
    for i, (start, end) in enumerate(expected):
        own = 2.0 * b[used : used + end - start] @ a[2 * i : 2 * i + 2]
        np.testing.assert_allclose(delta[start:end], own, rtol=1e-5, atol=1e-6)
        used += end - start
    touched = {row for start, end in expected for row in range(start, end)}
    assert not delta[[row for row in range(128) if row not in touched]].any()


def test_parts_that_could_be_equal_or_the_models_own_are_asked_for(tmp_path: Path) -> None:
    """Phi-3-medium's 7,680 rows, in small: 96 = 3 x 32 = 48 + 24 + 24."""
    changes = {"num_key_value_heads": 2, "hidden_size": 48, "intermediate_size": 64}
    config = read_model_config(write_model(tmp_path / "m", **changes))
    qkv = "model.layers.0.self_attn.qkv_proj"
    a, b = np.ones((6, 48), np.float32), np.arange(192, dtype=np.float32).reshape(96, 2)
    tensors = {f"{qkv}.lora_A": a, f"{qkv}.lora_B": b}
    with pytest.raises(AdapterError, match="pass --parts equal or --parts model"):
        from_loralib(tensors, MissingMetadata(4.0), "x.pt", config)
    found = {
        parts: from_loralib(tensors, MissingMetadata(4.0, "", (), parts), "x.pt", config).pair(qkv)[
            1
        ]
        for parts in ("equal", "model")
    }
    assert np.flatnonzero(found["equal"][:, 0]).max() == 31
    assert np.flatnonzero(found["model"][:, 0]).max() == 47
    with pytest.raises(AdapterError, match="neither equal parts nor those of the model"):
        from_loralib(
            {f"{qkv}.lora_A": a, f"{qkv}.lora_B": b[:90]}, MissingMetadata(4.0), "x.pt", config
        )


def test_what_cannot_be_placed_is_told() -> None:
    a, b = np.ones((2, 8), np.float32), np.ones((12, 1), np.float32)
    qkv = "model.layers.0.self_attn.qkv_proj"
    cases = {
        "without its pair": {f"{qkv}.lora_A": a},
        "pass --enable": {f"{qkv}.lora_A": a, f"{qkv}.lora_B": b},
        "not a module path of Phi-3": {"h.0.lora_A": a[:1], "h.0.lora_B": b},
        "not a fused projection": {
            "model.layers.0.mlp.down_proj.lora_A": a,
            "model.layers.0.mlp.down_proj.lora_B": b,
        },
        "no lora_A and lora_B": {"weight": a},
    }
    for phrase, tensors in cases.items():
        with pytest.raises(AdapterError, match=phrase):
            from_loralib(tensors, MissingMetadata(1.0), "x.pt")
