"""Damaged and foreign files give one clear error and exit code 2, and nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.convert import ConversionRequest, convert
from phi3_lora.adapters.formats.folder import write_adapter_folder
from phi3_lora.adapters.formats.mlx_lm import mlx_tensors
from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.errors import AdapterError
from phi3_lora.storage.safetensors import encode, read_all_float32
from tests.cli.test_contract import Capture, run
from tests.tiny import random_adapter, write_model

pytest.importorskip("gguf")
MODULE = "model.layers.0.self_attn.qkv_proj"
A, B = lora_a_name(MODULE), lora_b_name(MODULE)
PEFT_FILE = "adapter_model.safetensors"


def adapter() -> Adapter:
    weights = random_adapter({MODULE: (192, 64), "model.layers.0.mlp.down_proj": (64, 96)}, r=4)
    return Adapter(weights=weights, r=4, lora_alpha=8.0, num_layers=2)


def write_peft(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    write_adapter_folder(folder, adapter(), to="peft")
    tensors = read_all_float32(folder / PEFT_FILE, AdapterError)
    change(tensors)
    (folder / PEFT_FILE).write_bytes(encode(tensors))


def write_config(folder: Path, text: str | None, **changes: Any) -> None:
    write_adapter_folder(folder, adapter(), to="peft")
    path = folder / "adapter_config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(raw) if text is None else text)


def write_raw(folder: Path, content: bytes) -> None:
    write_adapter_folder(folder, adapter(), to="peft")
    (folder / PEFT_FILE).write_bytes(content)


def write_cut(folder: Path, kept: int) -> None:
    write_adapter_folder(folder, adapter(), to="peft")
    path = folder / PEFT_FILE
    path.write_bytes(path.read_bytes()[:kept])


def write_index(folder: Path, where: str = "../{}") -> None:
    """Write an index whose shards are outside the folder."""
    write_adapter_folder(folder, adapter(), to="peft")
    (folder / PEFT_FILE).rename(folder.parent / PEFT_FILE)
    names = {name: where.format(PEFT_FILE) for name in adapter().weights}
    (folder / f"{PEFT_FILE}.index.json").write_text(json.dumps({"weight_map": names}))


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


def write_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "archive/data.pkl", pickle.dumps({f"{MODULE}.lora_A": _Evil()}, protocol=2)
        )


def write_npz(path: Path, kept: int | None = None, **more: Any) -> None:
    with path.open("wb") as file:
        np.savez(file, **{n: t.make() for n, t in mlx_tensors(adapter()).items()}, **more)
    if kept is not None:
        path.write_bytes(path.read_bytes()[:kept])


def write_gguf(path: Path, kept: int | None = None) -> None:
    write_adapter_folder(path.parent / "whole", adapter())
    convert(ConversionRequest(source=path.parent / "whole", target=path, to="gguf"))
    if kept is not None:
        path.write_bytes(path.read_bytes()[:kept])


def write_model_gguf(path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_two(folder: Path) -> None:
    write_adapter_folder(folder, adapter(), to="both")
    tensors = read_all_float32(folder / PEFT_FILE, AdapterError)
    tensors[A][0, 0] += np.float32(1e-3)
    (folder / PEFT_FILE).write_bytes(encode(tensors))


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "A without B": (lambda p: write_peft(p, lambda t: t.pop(B)), f"its pair {B} is missing"),
    "B without A": (lambda p: write_peft(p, lambda t: t.pop(A)), f"its pair {A} is missing"),
    "extra tensor": (
        lambda p: write_peft(p, lambda t: t.update({"score.weight": np.ones((2, 2), np.float32)})),
        "score.weight: not a LoRA tensor",
    ),
    "transposed": (
        lambda p: write_peft(p, lambda t: t.update({A: np.ascontiguousarray(t[A].T)})),
        "does not hold rank 4",
    ),
    "both transposed": (
        lambda p: write_peft(
            p, lambda t: t.update({n: np.ascontiguousarray(t[n].T) for n in (A, B)})
        ),
        "does not hold rank 4",
    ),
    "wrong width": (
        lambda p: write_peft(p, lambda t: t.update({A: np.ones((4, 63), np.float32)})),
        "the base model needs (r, 64)",
    ),
    "not finite": (
        lambda p: write_peft(p, lambda t: t[A].__setitem__((0, 0), np.nan)),
        f"{A}: holds NaN or infinity",
    ),
    "wrong rank": (
        lambda p: write_peft(p, lambda t: t.update({B: np.ones((192, 3), np.float32)})),
        "does not hold rank 4",
    ),
    "no tensors": (lambda p: write_peft(p, lambda t: t.clear()), "holds no adapter"),
    "renamed": (
        lambda p: write_peft(p, lambda t: t.update({A.replace("base_model.", ""): t.pop(A)})),
        "not a LoRA tensor",
    ),
    "unknown layer": (
        lambda p: write_peft(
            p, lambda t: [t.update({n.replace("layers.0", "layers.9"): t.pop(n)}) for n in (A, B)]
        ),
        "the base model has no such linear layer",
    ),
    "two that disagree": (write_two, f"{A}: different values"),
    "a config that lies about r": (lambda p: write_config(p, None, r=8), "does not hold rank 8"),
    "a config that is none": (lambda p: write_config(p, "[" * 100_000), "adapter_config.json"),
    "an alpha that is none": (lambda p: write_config(p, None, lora_alpha="16"), "lora_alpha must"),
    "an alpha of 0": (lambda p: write_config(p, None, lora_alpha=0), "scale must be a number > 0"),
    "infinite": (
        lambda p: write_peft(p, lambda t: t[B].__setitem__((0, 0), np.inf)),
        f"{B}: holds NaN or infinity",
    ),
    "one byte short": (lambda p: write_cut(p, -1), "is not a safetensors file: truncated"),
    "half a file": (lambda p: write_cut(p, 3_000), "is not a safetensors file: truncated"),
    "no bytes": (lambda p: write_cut(p, 0), "is not a whole safetensors file (0 bytes)"),
    "a header of 2**60 bytes": (
        lambda p: write_raw(p, (2**60).to_bytes(8, "little") + b"{}" * 100),
        "is not a whole safetensors file",
    ),
    "an HTML page": (
        lambda p: write_raw(p, b"<!DOCTYPE html><html><body>404</body></html>"),
        "is not a whole safetensors file",
    ),
    "an absolute path": (lambda p: write_index(p, "/etc/{}"), "names files outside its folder"),
    "a header that is too deep": (
        lambda p: write_raw(p, (100_000).to_bytes(8, "little") + b"[" * 100_000),
        "is not a safetensors file",
    ),
    "a path with ..": (write_index, "names files outside its folder"),
    "a pickle with code": (write_pickle, "asks for posix.system, which is not a tensor"),
    "an npz with objects": (
        lambda p: write_npz(p, evil=np.array([_Evil()], dtype=object)),
        "not a complete .npz of numbers",
    ),
    "an npz of integers": (lambda p: write_npz(p, n=np.arange(3)), "not of a float type"),
    "half an npz": (lambda p: write_npz(p, kept=900), "not a complete archive"),
    "half a GGUF": (lambda p: write_gguf(p, kept=700), "not a complete GGUF file"),
    "a GGUF without its end": (lambda p: write_gguf(p, kept=-8), "not a complete GGUF file"),
    "a GGUF model": (write_model_gguf, "not a LoRA adapter: its general.type is 'model'"),
    "a text": (lambda p: p.write_text("GGUF is nice"), "not a complete GGUF file"),
    "nothing": (lambda p: p.write_bytes(b""), ""),
    "an empty folder": (lambda p: p.mkdir(), "holds no adapter"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_source_is_one_error_and_nothing_is_written(
    capsys: Capture, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write, phrase = CASES[case]
    model = write_model(tmp_path / "model")
    write(tmp_path / "source")
    before = sorted(tmp_path.iterdir())
    code, out, err = run(
        *(capsys, "convert", tmp_path / "source", tmp_path / "target", "--to", "both"),
        *("--model", model, *(("--alpha", "8") if (tmp_path / "source").is_file() else ())),
    )
    assert (code, out) == (2, "") and phrase in err, err
    assert err.startswith("error: ") or "\nerror: " in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "name", ["with spaces in it", "größe-模型", "CON", "a" * 200, "-x", "a.gguf"]
)
@pytest.mark.parametrize("to", ["both", "gguf"])
def test_any_name_of_a_target_is_written(tmp_path: Path, name: str, to: str) -> None:
    write_adapter_folder(tmp_path / "a", adapter())
    target = tmp_path / "deep" / name
    assert (
        convert(
            ConversionRequest(source=tmp_path / "a", target=target, to=to)
        ).max_relative_difference
        == 0.0
    )
    assert [p.name for p in (tmp_path / "deep").iterdir()] == [name]


def test_a_name_that_no_disk_takes_is_one_error(capsys: Capture, tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "a", adapter())
    for to in ("both", "gguf"):
        code, _, err = run(capsys, "convert", tmp_path / "a", tmp_path / ("a" * 300), "--to", to)
        assert code == 2 and err.startswith("error: ")


def test_a_source_may_be_a_link_and_an_archive_is_never_unpacked(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "a", adapter())
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert convert(
        ConversionRequest(source=tmp_path / "link", target=tmp_path / "b", to="peft")
    ).lossless
    with zipfile.ZipFile(tmp_path / "slip.npz", "w") as archive:
        archive.writestr("../../owned.npy", b"x")
    with pytest.raises(AdapterError, match=r"not a complete \.npz"):
        convert(ConversionRequest(source=tmp_path / "slip.npz", target=tmp_path / "c", to="peft"))
    assert not (tmp_path.parent / "owned.npy").exists()


def test_a_target_that_is_there_stays_as_it_was(capsys: Capture, tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "a", adapter())
    (tmp_path / "t").mkdir()
    (tmp_path / "t/notes.txt").write_text("mine")
    code, _, err = run(capsys, "convert", tmp_path / "a", tmp_path / "t", "--to", "peft")
    assert code == 2 and "is in use" in err
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["notes.txt"]
    (tmp_path / "x.gguf").write_text("mine")
    code, _, err = run(capsys, "convert", tmp_path / "a", tmp_path / "x.gguf", "--to", "gguf")
    assert code == 2 and "exists already" in err and (tmp_path / "x.gguf").read_text() == "mine"
