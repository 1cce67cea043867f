"""Cases in which an adapter could silently be read as a different one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter, with_spec
from phi3_lora.adapters.compress import drop_initial_factors
from phi3_lora.adapters.convert import ConversionRequest, convert
from phi3_lora.adapters.deltas import Weighted, concatenated, relative_difference
from phi3_lora.adapters.factorization import product_norm
from phi3_lora.adapters.formats.folder import read_adapter, write_adapter_folder
from phi3_lora.adapters.formats.fused import part_slices, with_blocks
from phi3_lora.adapters.formats.loralib import from_loralib
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.torch_pickle import encode_torch_file
from phi3_lora.adapters.initialization import initial_weights, trained_masks
from phi3_lora.adapters.names import lora_a_name, lora_b_name, magnitude_name, saved_name
from phi3_lora.adapters.targets import resolve
from phi3_lora.config.adapter import LoraConfig
from phi3_lora.errors import AdapterError
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import read_model_config
from phi3_lora.storage.safetensors import read_all_float32
from tests.cli.test_contract import Capture, run, run_json
from tests.tiny import random_adapter, write_model

QKV = "model.layers.0.self_attn.qkv_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", num_key_value_heads=2)


def plain(shapes: dict[str, tuple[int, int]] | None = None, **changes: object) -> Adapter:
    weights = random_adapter(shapes or {QKV: (128, 64), DOWN: (64, 96)}, r=4, seed=3)
    return Adapter(**{"weights": weights, "r": 4, "lora_alpha": 8.0, "num_layers": 2, **changes})


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("whole", [False, True])
def test_an_adapted_embedding_of_a_tied_model_is_refused_wherever_it_is_read(
    capsys: Capture, tmp_path: Path, name: str, whole: bool
) -> None:
    tied = write_model(tmp_path / "tied", tie_word_embeddings=True)
    adapter = plain({name: (64, 264) if name != "lm_head" else (264, 64)})
    if whole:
        extra = {saved_name(name): np.ones((264, 64), np.float32)}
        adapter = plain(weights={**plain().weights, **extra})
    write_adapter_folder(tmp_path / "a", adapter)
    for words in (
        ("merge", "--model", tied, "--adapter", tmp_path / "a", "--output", tmp_path / "m"),
        ("convert", tmp_path / "a", tmp_path / "c", "--to", "both", "--model", tied),
    ):
        code, _, err = run(capsys, *words)
        assert code == 2 and "head is its embedding" in err, err
    # Without a model the check is not possible, and a note says so.
    _, _, err = run(capsys, "convert", tmp_path / "a", tmp_path / "c", "--to", "peft")
    assert f"it adapts {name}: on a model whose head is its embedding" in err


def spec_and_start(config: ModelConfig, folder: Path, **settings: object):
    base = read_all_float32(folder / "model.safetensors", AdapterError)
    chosen = LoraConfig(r=4, lora_alpha=8, **settings)
    spec = resolve(chosen, config).spec
    start = initial_weights(
        spec,
        config.adaptable_shapes(),
        seed=0,
        base=lambda module: base[f"{module}.weight"],
        init=chosen.init_lora_weights or True,
    )
    return spec, start


def trained(spec, start: dict, config: ModelConfig) -> dict:
    """Add small random changes to all elements that train."""
    masks = trained_masks(spec, config.adaptable_shapes())
    rng = np.random.default_rng(0)
    return {
        name: (value + 1e-3 * rng.normal(size=value.shape) * masks.get(name, True)).astype("f4")
        for name, value in start.items()
    }


@pytest.mark.parametrize("kind", ["plain", "pissa", "concatenated"])
def test_parts_that_are_trained_on_stay_the_parts(model: Path, kind: str) -> None:
    config = read_model_config(model)
    init = "pissa" if kind == "pissa" else True
    names = ("q_proj", "v_proj")
    spec, start = spec_and_start(config, model, target_modules=names, init_lora_weights=init)
    adapter = with_spec(trained(spec, start, config), spec)
    exported = drop_initial_factors(adapter, spec)
    if kind == "concatenated":
        exported = concatenated([Weighted(exported, 0.5), Weighted(exported, 0.5)])
    again = with_blocks(exported.spec, exported.weights, config)
    mask = trained_masks(again, config.adaptable_shapes())[lora_b_name(QKV)]
    rows = part_slices(QKV, config)
    k_rows = rows["model.layers.0.self_attn.k_proj"]
    assert not mask[k_rows].any() and mask.any(axis=0).all()
    assert not exported.pair(QKV)[1][k_rows].any()


def test_a_fresh_adapter_of_whole_weights_trains_everything(model: Path) -> None:
    config = read_model_config(model)
    spec, start = spec_and_start(config, model)
    assert with_blocks(spec, start, config) == spec


def test_magnitudes_of_rows_that_are_not_adapted_do_not_train(model: Path) -> None:
    config = read_model_config(model)
    spec, _ = spec_and_start(config, model, target_modules=("q_proj", "v_proj"), use_dora=True)
    mask = trained_masks(spec, config.adaptable_shapes())[magnitude_name(QKV)]
    rows = part_slices(QKV, config)
    found = {name.rsplit(".", 1)[-1]: set(mask[part].tolist()) for name, part in rows.items()}
    assert found == {"q_proj": {True}, "k_proj": {False}, "v_proj": {True}}


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "k_proj")])
def test_an_exported_start_from_the_weights_has_nothing_that_cancels(
    model: Path, tmp_path: Path, targets: str | tuple[str, ...]
) -> None:
    """Two halves that nearly cancel would become noise in half precision or another scale."""
    config = read_model_config(model)
    settings = {"target_modules": targets, "init_lora_weights": "pissa"}
    if targets == "all-linear":
        settings["alpha_pattern"] = {"o_proj": 3, "down_proj": 5}
    spec, start = spec_and_start(config, model, **settings)
    raw = with_spec(trained(spec, start, config), spec, num_layers=2)
    found = drop_initial_factors(raw, spec)
    assert max(relative_difference(raw, found).values()) <= 1e-4
    for module in found.modules:
        a, b = (value.astype(np.float64) for value in found.pair(module))
        size = np.linalg.norm(a) * np.linalg.norm(b)
        assert size <= 20 * product_norm(b, a)
    # The conversion to one scale repairs such factors of another tool.
    for number, adapter in enumerate((raw, found)):
        write_adapter_folder(tmp_path / f"{number}", adapter, to="peft")
        result = convert(
            ConversionRequest(
                source=tmp_path / f"{number}", target=tmp_path / f"m{number}", to="mlx"
            )
        )
        assert result.max_relative_difference <= 1e-6


@pytest.mark.parametrize(
    ("enable", "with_model"), [(("q", "gate"), False), (("q", "gate"), True), (("v", "up"), True)]
)
def test_a_merged_linear_with_one_part_is_that_part(
    model: Path, enable: tuple[str, str], with_model: bool
) -> None:
    config = read_model_config(model) if with_model else None
    rng = np.random.default_rng(0)
    part, half = enable
    # loralib's equal parts of 96 rows differ from the model's; gate and up are equal anyway.
    rows = {"q": 64, "v": 32}[part]
    gate_up = "model.layers.0.mlp.gate_up_proj"
    tensors = {
        f"{QKV}.lora_A": rng.normal(size=(3, 64)).astype(np.float32),
        f"{QKV}.lora_B": rng.normal(size=(rows, 3)).astype(np.float32),
        f"{gate_up}.lora_A": rng.normal(size=(3, 64)).astype(np.float32),
        f"{gate_up}.lora_B": rng.normal(size=(96, 3)).astype(np.float32),
    }
    adapter = from_loralib(tensors, MissingMetadata(6.0, "", enable), "x.pt", config)
    b = adapter.pair(gate_up)[1]
    assert b.shape == (192, 3)
    assert b[:96].any() == (half == "gate") and b[96:].any() == (half == "up")
    if with_model:
        qkv = adapter.pair(QKV)[1]
        assert qkv.shape == (128, 3)
        assert np.flatnonzero(qkv.any(axis=1)).tolist() == list(
            range(0, 64) if part == "q" else range(96, 128)
        )


def test_the_newest_of_numbered_checkpoints_is_read_and_several_files_are_refused(
    tmp_path: Path,
) -> None:
    for number, seed in ((100, 1), (200, 2)):
        weights = random_adapter({QKV: (128, 64)}, r=4, seed=seed)
        write_adapter_folder(tmp_path / f"{number}", plain(weights=weights), to="mlx")
    folder = tmp_path / "a"
    shutil.copytree(tmp_path / "100", folder)
    (folder / "adapters.safetensors").rename(folder / "0000100_adapters.safetensors")
    last = tmp_path / "200/adapters.safetensors"
    shutil.copy(last, folder / "0000200_adapters.safetensors")
    expected = read_adapter(tmp_path / "200").weights
    assert all(np.array_equal(read_adapter(folder).weights[n], v) for n, v in expected.items())
    shutil.copy(tmp_path / "100/adapters.safetensors", folder / "adapters.safetensors")
    expected = read_adapter(tmp_path / "100").weights
    assert all(np.array_equal(read_adapter(folder).weights[n], v) for n, v in expected.items())
    shutil.copy(last, folder / "other.safetensors")
    with pytest.raises(AdapterError, match=r"several adapters \(adapters.*, other.safetensors\)"):
        read_adapter(folder)


def test_a_pair_of_zeros_goes_everywhere(tmp_path: Path) -> None:
    zeros = {lora_a_name(DOWN): np.zeros((4, 96), "f4"), lora_b_name(DOWN): np.zeros((64, 4), "f4")}
    adapter = plain(weights={**plain().weights, **zeros})
    write_adapter_folder(tmp_path / "a", adapter, to="peft")
    for to in ("both", "mlx", "gguf", "unfused"):
        if to == "gguf":
            pytest.importorskip("gguf")
        config = None
        if to == "unfused":
            config = read_model_config(write_model(tmp_path / "m", num_key_value_heads=2))
        job = ConversionRequest(source=tmp_path / "a", target=tmp_path / to, to=to, config=config)
        assert convert(job).max_relative_difference == 0.0


def test_a_result_that_cannot_be_read_back_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi3_lora.adapters.formats import peft as peft_layout

    write_adapter_folder(tmp_path / "a", plain(), to="mlx")
    whole = peft_layout.peft_config
    monkeypatch.setattr(peft_layout, "peft_config", lambda a: {**whole(a), "r": 9})
    with pytest.raises(AdapterError, match="does not hold rank 9"):
        convert(ConversionRequest(source=tmp_path / "a", target=tmp_path / "b", to="peft"))
    assert not (tmp_path / "b").exists()


def test_options_that_the_source_does_not_need_are_refused(capsys: Capture, tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "a", plain())
    for words in (("--alpha", "9"), ("--prefix", "x."), ("--enable", "q"), ("--parts", "equal")):
        code, _, err = run(
            capsys, "convert", tmp_path / "a", tmp_path / "b", "--to", "peft", *words
        )
        assert code == 2 and f"{words[0]} has no effect" in err
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("alpha", ["0", "-3", "nan", "inf"])
def test_an_alpha_that_is_none_is_refused(capsys: Capture, tmp_path: Path, alpha: str) -> None:
    a, b = plain().pair(DOWN)
    tensors = {f"{DOWN}.lora_A": a, f"{DOWN}.lora_B": b}
    (tmp_path / "x.pt").write_bytes(encode_torch_file(tensors))
    code, _, err = run(
        capsys, "convert", tmp_path / "x.pt", tmp_path / "b", "--to", "peft", "--alpha", alpha
    )
    assert code == 2 and "--alpha must be a number > 0" in err and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ({"modules_to_save": 7}, "modules_to_save must be a list of names"),
        ({"rank_pattern": {"o_proj": 16.7}}, "rank_pattern must map names to whole numbers"),
        ({"lora_parameters": {"rank": 4, "scale": 10**400}}, "scale must be a number"),
    ],
)
def test_numbers_that_no_float_holds_are_named(
    capsys: Capture, tmp_path: Path, change: dict[str, object], phrase: str
) -> None:
    write_adapter_folder(tmp_path / "a", plain())
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    code, _, err = run(capsys, "inspect", tmp_path / "a")
    assert code == 2 and phrase in err


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.999999999.mlp.down_proj",
        "model.layers.03.mlp.down_proj",
        "model.x",
        DOWN + "s",
    ],
)
def test_modules_that_no_phi3_has_are_refused(tmp_path: Path, module: str) -> None:
    write_adapter_folder(tmp_path / "a", plain({module: (64, 96)}), to="peft")
    with pytest.raises(AdapterError, match="not a module of a Phi-3 model"):
        read_adapter(tmp_path / "a")


def test_targets_inside_their_sources_or_in_use_are_refused(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    write_adapter_folder(tmp_path / "a", plain())
    for words in ((), ("--to", "adapter")):
        output = tmp_path / "a/m"
        code, _, err = run(
            *(capsys, "merge", "--model", model, "--adapter", tmp_path / "a"),
            *("--output", output, *words),
        )
        assert code == 2 and "is inside" in err and not output.exists()
    (tmp_path / "o").mkdir()
    (tmp_path / "o/Modelfile").write_text("mine")
    code, _, err = run(
        capsys, "convert", tmp_path / "a", tmp_path / "o", "--for", "ollama", "--model", model
    )
    assert code == 2 and "is in use" in err
    assert [p.read_text() for p in (tmp_path / "o").iterdir()] == ["mine"]


def test_a_sum_that_is_no_number_and_an_option_without_effect_are_refused(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    write_adapter_folder(tmp_path / "a", plain())
    words = ("merge", "--model", model, "--adapter", tmp_path / "a", "--output", tmp_path / "s")
    code, _, err = run(capsys, *words, "--to", "adapter", "--weight", "1e39")
    assert code == 2 and "choose another --weight" in err and not (tmp_path / "s").exists()
    code, _, err = run(capsys, *words, "--dequantize")
    assert code == 2 and "is not quantised" in err
    code, _, err = run(capsys, *words, "--weight", "0")
    assert code == 0 and "nothing is changed: every delta, times its --weight, is 0" in err


def test_the_card_of_a_converted_adapter_says_what_changed(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "a", plain(), files={"README.md": b"# Card\n"})
    convert(ConversionRequest(source=tmp_path / "a", target=tmp_path / "b", to="peft", rank=2))
    text = (tmp_path / "b/README.md").read_text()
    assert text.startswith("# Card\n")
    assert "to peft, cut to rank 2: here rank, alpha and scale are 2, 4 and 2." in text


def test_loralib_and_gguf_files_are_inspected_and_loaded(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    a, b = plain().pair(DOWN)
    state = {f"{DOWN}.lora_A": a, f"{DOWN}.lora_B": b}
    (tmp_path / "x.pt").write_bytes(encode_torch_file(state))
    facts = run_json(capsys, "inspect", tmp_path / "x.pt", "--alpha", "8")
    assert facts["layout"] == "loralib" and facts["modules"][DOWN]["scale"] == 2.0
    write_adapter_folder(tmp_path / "a", plain())
    convert(ConversionRequest(source=tmp_path / "a", target=tmp_path / "x.gguf", to="gguf"))
    words = ("merge", "--model", model, "--output", tmp_path / "m", "--dtype", "float32")
    assert run_json(capsys, *words, "--adapter", tmp_path / "x.gguf")["survival"]
    code, _, err = run(capsys, *words[:-3], tmp_path / "n", "--adapter", tmp_path / "x.pt")
    assert code == 2 and "pass --alpha to phi3-lora convert" in err


def test_a_whole_state_dict_with_integers_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    a, b = plain().pair(DOWN)
    state = {
        f"{DOWN}.lora_A": torch.from_numpy(a),
        f"{DOWN}.lora_B": torch.from_numpy(b),
        "position_ids": torch.arange(8),
        "mask": torch.ones(3, dtype=torch.bool),
        "weight": torch.ones(2, 2),
    }
    torch.save(state, tmp_path / "x.pt")
    job = ConversionRequest(
        source=tmp_path / "x.pt", target=tmp_path / "b", to="both", missing=MissingMetadata(8.0)
    )
    assert convert(job).lossless


def test_what_a_given_adapter_makes_useless_is_named(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    write_adapter_folder(tmp_path / "a", plain())
    code, _, err = run(
        *(capsys, "train", "--model", model, "--data", "demo", "--output", tmp_path / "r"),
        *("--adapter", tmp_path / "a", "--dry-run", "--rank", "3"),
        *("--set", "peft_config.use_dora=true", "--set", "peft_config.lora_dropout=0.1"),
    )
    assert code == 0, err
    assert "peft_config.r, peft_config.use_dora has no effect: the adapter brings its own" in err


def test_settled_leaves_other_adapters_alone() -> None:
    adapter = plain()
    assert dataclasses.replace(drop_initial_factors(adapter, adapter.spec)) == adapter
