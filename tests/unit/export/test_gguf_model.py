from __future__ import annotations

import errno
import sys
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from phi3_lora.errors import ModelError, StorageError
from phi3_lora.export.gguf_model import unchanged_as_stored, write_gguf
from phi3_lora.export.gguf_tensors import OUT_TYPES, as_q8_0
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import check_weights
from phi3_lora.storage.safetensors import NewTensor, TensorInfo, from_float32, to_float32
from tests.tiny import TEMPLATE, random_weights, write_model

Weights = dict[str, np.ndarray]
LONGROPE = {
    "hidden_size": 128,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.75,
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 256,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": np.linspace(1, 1.5, 12).tolist(),
        "long_factor": np.geomspace(1, 16, 12).tolist(),
    },
}


def new_tensors(weights: Weights, stored_as: str) -> dict[str, NewTensor]:
    return {
        name: NewTensor(stored_as, w.shape, lambda w=w: from_float32(w, stored_as))
        for name, w in weights.items()
    }


def write(folder: Path, out_type: str, **given: Weights) -> tuple[gguf.GGUFReader, list[str]]:
    config = read_model_config(folder)
    weights = given.get("weights") or random_weights(config, 0)
    tensors = new_tensors(weights, OUT_TYPES[out_type].stored_as)
    path = folder / "model.gguf"
    notes = write_gguf(path, folder, config, tensors, out_type=out_type)
    return gguf.GGUFReader(path), notes


def values(reader: gguf.GGUFReader) -> Weights:
    """Read every tensor of a file as float32, by name."""
    found = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        found[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return found


def keys(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def rounded(value: np.ndarray, out_type: str) -> np.ndarray:
    stored_as = OUT_TYPES[out_type].stored_as
    return to_float32(from_float32(value, stored_as), stored_as)


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
    "model.layers.1.self_attn.qkv_proj.weight": "blk.1.attn_qkv.weight",
    "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
    "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
    "model.layers.1.mlp.gate_up_proj.weight": "blk.1.ffn_up.weight",
    "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
}
LAYER_0 = {hf.replace(".1.", ".0."): name.replace(".1.", ".0.") for hf, name in NAMES.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


class TestTensors:
    @pytest.mark.parametrize("out_type", ["f32", "f16", "bf16"])
    def test_hold_the_weights_rounded_once_under_llama_cpps_names(
        self, model: Path, out_type: str
    ) -> None:
        weights = random_weights(read_model_config(model), 0)
        found = values(write(model, out_type)[0])
        assert found.keys() == {*NAMES.values(), *LAYER_0.values()}
        for name, gguf_name in {**NAMES, **LAYER_0}.items():
            vector = weights[name].ndim == 1
            expected = (
                weights[name] if vector and out_type == "f32" else rounded(weights[name], out_type)
            )
            np.testing.assert_array_equal(found[gguf_name], expected, err_msg=name)

    def test_of_q8_0_are_within_half_a_step(self, model: Path) -> None:
        weights = random_weights(read_model_config(model), 0)
        found = values(write(model, "q8_0")[0])
        for name, gguf_name in {**NAMES, **LAYER_0}.items():
            if weights[name].ndim == 1:
                np.testing.assert_array_equal(found[gguf_name], weights[name])
                continue
            blocks = weights[name].reshape(-1, 32)
            step = np.abs(blocks).max(axis=1, keepdims=True) / 127
            # The scale is stored in 11 bits, and multiplied by up to 127.
            allowed = step * (0.5 + 127 * 2**-11)
            assert (np.abs(found[gguf_name].reshape(-1, 32) - blocks) <= allowed).all(), name

    def test_of_one_dimension_are_float32_in_every_file(self, model: Path) -> None:
        for out_type in OUT_TYPES:
            reader, _ = write(model, out_type)
            vectors = {t.tensor_type for t in reader.tensors if len(t.shape) == 1}
            assert vectors == {gguf.GGMLQuantizationType.F32}, out_type

    def test_of_one_dimension_given_in_full_are_not_rounded(self, model: Path) -> None:
        config = read_model_config(model)
        weights = random_weights(config, 0)
        tensors = new_tensors(weights, "BF16")
        norm = "model.norm.weight"
        tensors[norm] = NewTensor("F32", weights[norm].shape, lambda: weights[norm])
        write_gguf(model / "model.gguf", model, config, tensors, out_type="bf16")
        found = values(gguf.GGUFReader(model / "model.gguf"))
        np.testing.assert_array_equal(found["output_norm.weight"], weights[norm])

    def test_of_a_tied_head_are_written_once(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "tied", tie_word_embeddings=True)
        assert "output.weight" not in values(write(folder, "f16")[0])

    def test_of_longrope_are_both_sets_of_factors(self, tmp_path: Path) -> None:
        found = values(write(write_model(tmp_path / "long", **LONGROPE), "f16")[0])
        for name in ("long", "short"):
            expected = np.float32(LONGROPE["rope_scaling"][f"{name}_factor"])
            np.testing.assert_array_equal(found[f"rope_factors_{name}.weight"], expected)

    def test_whose_rows_are_no_multiple_of_32_are_f16_in_q8_0_and_noted(
        self, tmp_path: Path
    ) -> None:
        folder = write_model(tmp_path / "odd", intermediate_size=100)
        reader, notes = write(folder, "q8_0")
        kinds = {t.name: t.tensor_type.name for t in reader.tensors}
        assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
        assert any("2 matrices are F16" in note for note in notes)

    def test_are_made_one_at_a_time_and_let_go(self, model: Path) -> None:
        config = read_model_config(model)
        alive: list[weakref.ref[np.ndarray]] = []

        def make(weight: np.ndarray) -> np.ndarray:
            assert all(ref() is None for ref in alive)
            value = weight.copy()
            alive.append(weakref.ref(value))
            return value

        tensors = {
            name: NewTensor("F32", w.shape, lambda w=w: make(w))
            for name, w in random_weights(config, 0).items()
        }
        for out_type in ("f32", "q8_0"):
            write_gguf(model / "model.gguf", model, config, tensors, out_type=out_type)
        assert len(alive) == 2 * len(tensors)

    def test_of_many_blocks_are_whole(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = values(write(model, "q8_0")[0])
        monkeypatch.setattr("phi3_lora.export.gguf_tensors._BLOCK_ELEMENTS", 200)
        blocks = values(write(model, "q8_0")[0])
        for name, value in whole.items():
            np.testing.assert_array_equal(blocks[name], value)


class TestUnchangedTensors:
    def test_come_from_the_base_and_changed_ones_from_the_merge(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "model", dtype="float32")
        config = read_model_config(folder)
        own = random_weights(config, 0)
        merged = {name: np.ones_like(w) for name, w in own.items()}
        module = "model.layers.1.mlp.down_proj"
        tensors = unchanged_as_stored(
            new_tensors(merged, "BF16"), check_weights(folder, config), {module}
        )
        write_gguf(folder / "model.gguf", folder, config, tensors, out_type="bf16")
        found = values(gguf.GGUFReader(folder / "model.gguf"))
        for name, gguf_name in {**NAMES, **LAYER_0}.items():
            # Vectors stay float32 because they are not rounded.
            kept = own[name] if own[name].ndim == 1 else rounded(own[name], "bf16")
            expected = merged[name] if name == f"{module}.weight" else kept
            np.testing.assert_array_equal(found[gguf_name], expected, err_msg=name)

    def test_that_are_no_floats_come_from_the_merge(self, model: Path) -> None:
        tensors = new_tensors(random_weights(read_model_config(model), 0), "F32")
        name = "model.layers.1.mlp.down_proj.weight"
        packed = TensorInfo(model, "U32", tensors[name].shape, 0, 0)
        assert unchanged_as_stored(tensors, {name: packed, "other.scales": packed}, ()) == tensors


class TestQ8:
    def test_values_are_what_a_reader_gets_and_stay_when_written_again(self, model: Path) -> None:
        weights = random_weights(read_model_config(model), 0)
        name = "model.layers.0.mlp.down_proj.weight"
        expected = as_q8_0(weights[name])
        assert not np.array_equal(expected, weights[name])
        for given in (weights, {**weights, name: expected}):
            found = values(write(model, "q8_0", weights=given)[0])
            np.testing.assert_array_equal(found["blk.0.ffn_down.weight"], expected)

    def test_values_of_odd_rows_are_float16(self) -> None:
        value = np.random.default_rng(0).normal(size=(4, 33)).astype(np.float32)
        np.testing.assert_array_equal(as_q8_0(value), value.astype(np.float16))

    def test_values_of_zeros_are_zeros(self) -> None:
        assert not as_q8_0(np.zeros((2, 64), np.float32)).any()


class TestKeys:
    def test_are_those_of_llama_cpps_converter(self, tmp_path: Path) -> None:
        found = keys(write(write_model(tmp_path / "long", **LONGROPE), "bf16")[0])
        expected = {
            "general.architecture": "phi3",
            "general.type": "model",
            "general.file_type": 32,
            "phi3.context_length": 1024,
            "phi3.rope.scaling.original_context_length": 256,
            "phi3.embedding_length": 128,
            "phi3.feed_forward_length": 96,
            "phi3.block_count": 2,
            "phi3.attention.head_count": 4,
            "phi3.attention.head_count_kv": 2,
            "phi3.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
            "phi3.rope.dimension_count": 24,
            "phi3.rope.freq_base": 10000.0,
            "phi3.attention.sliding_window": 0,
            "phi3.rope.scaling.attn_factor": pytest.approx(1.1180339887),
            "tokenizer.chat_template": TEMPLATE,
        }
        assert {name: found[name] for name in expected} == expected

    def test_of_plain_rope_have_no_attention_factor(self, model: Path) -> None:
        assert "phi3.rope.scaling.attn_factor" not in keys(write(model, "f16")[0])

    @pytest.mark.parametrize(("out_type", "number"), [("f32", 0), ("f16", 1), ("q8_0", 7)])
    def test_tell_the_file_type(self, model: Path, out_type: str, number: int) -> None:
        assert keys(write(model, out_type)[0])["general.file_type"] == number

    def test_and_a_note_tell_an_attention_window(self, tmp_path: Path) -> None:
        reader, notes = write(write_model(tmp_path / "window", sliding_window=47), "f16")
        assert keys(reader)["phi3.attention.sliding_window"] == 47
        assert any("texts of over 47 tokens" in note for note in notes)

    def test_and_a_note_tell_which_context_keeps_the_short_factors(self, tmp_path: Path) -> None:
        _, notes = write(write_model(tmp_path / "long", **LONGROPE), "f16")
        assert any("run with -c 256 " in note for note in notes)


class TestRefusals:
    def test_of_a_number_that_float16_does_not_hold_leave_the_older_file(self, model: Path) -> None:
        write(model, "f16")
        before = (model / "model.gguf").read_bytes()
        weights = random_weights(read_model_config(model), 0)
        weights["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e5
        for folder_tensors, out_type in (
            (new_tensors(weights, "F32"), "f16"),
            (
                new_tensors({name: w * np.float32(1e3) for name, w in weights.items()}, "F32"),
                "q8_0",
            ),
        ):
            with pytest.raises(ModelError, match=r"does not hold: use --outtype bf16 or f32"):
                write_gguf(
                    model / "model.gguf",
                    model,
                    read_model_config(model),
                    folder_tensors,
                    out_type=out_type,
                )
        assert (model / "model.gguf").read_bytes() == before
        assert not list(model.glob(".*"))

    def test_of_a_full_disk_say_so_and_leave_nothing(self, model: Path) -> None:
        config = read_model_config(model)
        tensors = new_tensors(random_weights(config, 0), "F32")

        def full() -> np.ndarray:
            raise OSError(errno.ENOSPC, "No space left on device")

        last = "lm_head.weight"
        tensors[last] = tensors[last]._replace(make=full)
        with pytest.raises(StorageError, match="no space left"):
            write_gguf(model / "model.gguf", model, config, tensors, out_type="f32")
        assert not list(model.glob("*.gguf")) + list(model.glob(".*"))

    def test_of_a_missing_package_name_the_line_that_installs_it(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ModelError, match=r"pip install 'phi3-lora\[gguf\]'"):
            write(model, "f16")

    def test_of_heads_that_are_not_hidden_size_wide(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "wide", head_dim=32)
        with pytest.raises(ModelError, match=r"heads \* head_dim = hidden_size.*128 and 64"):
            write(folder, "f16")


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"num_key_value_heads": 2},
    "partial rotary, tied": {"partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "LongRoPE": LONGROPE,
}
MAX_ERROR = {"f32": 2e-5, "f16": 3e-2}
"""Tolerances for logits of standard deviation 1; with f16 llama.cpp also rounds activations."""


@pytest.mark.cuda
@pytest.mark.parametrize("out_type", MAX_ERROR)
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_gives_our_logits(tmp_path: Path, shape: str, out_type: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("torch")
    import phi3_lora
    from phi3_lora.engine.protocol import Batch

    folder = write_model(tmp_path / "model", **{"hidden_size": 128, **SHAPES[shape]})
    write(folder, out_type)
    length = 200
    tokens = np.random.default_rng(1).integers(0, 264, length).astype(np.int32)
    batch = Batch(
        tokens, np.append(tokens[1:], 0), np.zeros(length, bool), np.array([0, length], np.int32)
    )
    with phi3_lora.load(str(folder), backend="cuda", device="cpu", dtype="float32") as ours:
        expected = ours.engine.logits(batch, np.arange(length, dtype=np.int32))
    # A context of 256 is LongRoPE's boundary here. Keys and values stay float32 (type 0).
    options = {"n_ctx": 256, "logits_all": True, "type_k": 0, "type_v": 0, "n_threads": 2}
    theirs = llama_cpp.Llama(str(folder / "model.gguf"), verbose=False, **options)
    theirs.eval(tokens.tolist())
    found = np.array(theirs.scores[:length])
    theirs.close()
    assert np.abs(found - expected).max() < MAX_ERROR[out_type]
