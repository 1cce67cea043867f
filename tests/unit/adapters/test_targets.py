"""Resolution of peft_config to layers: every name matches a layer or is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lora.adapters.initialization import num_trained, trained_masks
from phi3_lora.adapters.targets import resolve
from phi3_lora.config.adapter import LoraConfig
from phi3_lora.config.load import load_settings
from phi3_lora.errors import ConfigError
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import read_model_config
from tests.tiny import write_model

LINEAR = [
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
]
QKV = "model.layers.0.self_attn.qkv_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Build a model whose q has 64 rows (4 heads of size 16), and k and v 32 each (2 heads)."""
    return read_model_config(write_model(tmp_path_factory.mktemp("m"), num_key_value_heads=2))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": "all-linear"}, LINEAR),
        ({"target_modules": ("all-linear",)}, LINEAR),
        ({"target_modules": ("qkv_proj",)}, [m for m in LINEAR if "qkv" in m]),
        ({"target_modules": "qkv_proj"}, [m for m in LINEAR if "qkv" in m]),
        (
            {"target_modules": ("down_proj", "qkv_proj")},
            [m for m in LINEAR if "down" in m or "qkv" in m],
        ),
        ({"target_modules": (QKV,)}, [QKV]),
        ({"target_modules": ("1.mlp.down_proj",)}, ["model.layers.1.mlp.down_proj"]),
        ({"target_modules": r".*layers\.[1]\.mlp\..*_proj"}, LINEAR[-2:]),
        ({"layers_to_transform": (1,)}, LINEAR[4:]),
        ({"target_modules": ("o_proj",), "layers_to_transform": (0,)}, [LINEAR[1]]),
        ({"exclude_modules": ("qkv_proj", "o_proj")}, [m for m in LINEAR if "mlp" in m]),
        ({"exclude_modules": ("k_proj",)}, LINEAR),
        ({"target_modules": ("all-linear", "lm_head")}, [*LINEAR, "lm_head"]),
        ({"exclude_modules": r".*layers\.0\..*"}, LINEAR[4:]),
        (
            {"target_modules": ("embed_tokens", "o_proj", "lm_head")},
            ["model.embed_tokens", LINEAR[1], LINEAR[5], "lm_head"],
        ),
        ({"target_modules": ("q_proj", "v_proj")}, [m for m in LINEAR if "qkv" in m]),
        ({"target_modules": r".*\.(q|up)_proj"}, [m for m in LINEAR if "qkv" in m or "gate" in m]),
    ],
)
def test_names_mean_modules_in_model_order(
    model: ModelConfig, settings: dict[str, Any], expected: list[str]
) -> None:
    assert list(resolve(LoraConfig(**settings), model).spec.modules) == expected


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"target_modules": ("proj",)}, "'proj' matches no layer of this model; there are: down_"),
        ({"target_modules": "qkv"}, "'qkv' matches no layer"),
        ({"target_modules": ("qkv_proj", "w_proj")}, "'w_proj' matches no layer"),
        ({"target_modules": "(qkv"}, "nor a regular expression"),
        ({"target_modules": ("lm_head",), "layers_to_transform": (0,)}, "'lm_head' matches no"),
        ({"layers_to_transform": (0, 2)}, "[2] names no layer; this model has 0 to 1"),
        ({"exclude_modules": ("embed_tokens",)}, "exclude_modules: 'embed_tokens' matches no"),
        ({"exclude_modules": ".*"}, "leaves nothing"),
        ({"rank_pattern": {"lm_head": 4}}, "rank_pattern: 'lm_head' matches no adapted layer"),
        ({"alpha_pattern": {"(": 4}}, "not a regular expression"),
        ({"modules_to_save": ("score",)}, "modules_to_save: 'score' matches no layer"),
        ({"modules_to_save": ("o_proj",)}, "o_proj is in target_modules too"),
        ({"use_dora": True, "target_modules": ("embed_tokens",)}, "other maths in PEFT"),
        (
            {"target_modules": ("q_proj", "v_proj"), "rank_pattern": {"q_proj": 4}},
            "the scales 8, 2",
        ),
    ],
)
def test_what_cannot_be_meant_is_an_error(
    model: ModelConfig, settings: dict[str, Any], phrase: str
) -> None:
    with pytest.raises(ConfigError) as problem:
        resolve(LoraConfig(**settings), model)
    assert phrase in str(problem.value)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_a_tied_embedding_is_not_adapted(tmp_path: Path, name: str, option: str) -> None:
    tied = read_model_config(write_model(tmp_path, tie_word_embeddings=True))
    with pytest.raises(ConfigError, match=f"{name}.*(head is its embedding|matches no layer)"):
        resolve(LoraConfig(**{option: (name,)}), tied)


def test_parts_of_a_fused_weight_lie_side_by_side_in_the_true_sizes(model: ModelConfig) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=("q_proj", "v_proj", "up_proj"),
        rank_pattern={"v_proj": 2},
        alpha_pattern={"v_proj": 4},
    )
    spec = resolve(config, model).spec
    layer = spec.layers[QKV]
    assert layer.r == 6 and spec.scaling(QKV) == 2.0
    assert [tuple(b) for b in layer.blocks] == [
        ("model.layers.0.self_attn.q_proj", (0, 64), (0, 4)),
        ("model.layers.0.self_attn.v_proj", (96, 128), (4, 6)),
    ]
    shapes = model.adaptable_shapes()
    mask = trained_masks(spec, shapes)[f"base_model.model.{QKV}.lora_B.weight"]
    expected = np.zeros((128, 6), bool)
    expected[:64, :4] = expected[96:, 4:] = True
    assert np.array_equal(mask, expected)
    assert spec.layers["model.layers.0.mlp.gate_up_proj"].blocks[0].rows == (96, 192)
    count = num_trained(spec, shapes, model.tensor_shapes())
    assert count == 2 * (4 * (64 + 64) + 2 * (64 + 32) + 4 * (64 + 96))


def test_a_part_that_is_excluded_leaves_the_others(model: ModelConfig) -> None:
    spec = resolve(LoraConfig(exclude_modules=("k_proj",)), model).spec
    assert [block.part[-6:] for block in spec.layers[QKV].blocks] == ["q_proj", "v_proj"]
    assert not spec.layers["model.layers.0.mlp.gate_up_proj"].blocks


def test_modules_to_save_takes_any_end_of_a_path_as_peft_does(model: ModelConfig) -> None:
    spec = resolve(LoraConfig(modules_to_save=("norm", "lm_head")), model).spec
    assert len(spec.saved) == 2 * 2 + 2


def test_a_part_beside_its_whole_is_reported(model: ModelConfig) -> None:
    found = resolve(LoraConfig(target_modules=("q_proj", "qkv_proj")), model)
    assert not found.spec.layers[QKV].blocks
    assert "q_proj are parts of a fused projection that is adapted as a whole" in found.notes[0]


def test_a_bias_trains_nothing_and_is_reported(model: ModelConfig) -> None:
    assert "trains nothing" in resolve(LoraConfig(bias="all"), model).notes[0]


def test_patterns_give_ranks_and_scales_by_module(model: ModelConfig) -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"o_proj": 2}, alpha_pattern={r"1\.mlp\.down_proj": 1.0}
    )
    spec = resolve(config, model).spec
    assert [spec.layers[m].r for m in LINEAR[:4]] == [4, 2, 4, 4]
    assert spec.scaling(LINEAR[1]) == 4.0 and spec.scaling(LINEAR[7]) == 0.25


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_that_stay_fixed_keep_the_scale(model: ModelConfig, use_rslora: bool) -> None:
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", use_rslora=use_rslora)
    spec = resolve(config, model).spec
    assert spec.layers[QKV].r == 8 and spec.layers[QKV].num_trained == 4
    assert spec.scaling(QKV) == pytest.approx(4.0 if use_rslora else 2.0, rel=1e-15)


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("layers_to_transform=1", "layers_to_transform", (1,)),
        ("layers_to_transform=[0, 1]", "layers_to_transform", (0, 1)),
        ("layers_to_transform=null", "layers_to_transform", None),
        ("rank_pattern={o_proj: 4}", "rank_pattern", {"o_proj": 4}),
        ("alpha_pattern={o_proj: 4}", "alpha_pattern", {"o_proj": 4.0}),
        ("rank_pattern=null", "rank_pattern", {}),
        ("modules_to_save=[lm_head]", "modules_to_save", ("lm_head",)),
        ("modules_to_save=null", "modules_to_save", None),
        ("init_lora_weights=true", "init_lora_weights", True),
        ("init_lora_weights=null", "init_lora_weights", True),
        ("init_lora_weights=pissa_niter_4", "init_lora_weights", "pissa_niter_4"),
        ("use_dora=true", "use_dora", True),
        ("bias=lora_only", "bias", "lora_only"),
    ],
)
def test_values_of_other_tools_configurations_are_taken(
    assignment: str, field: str, value: object
) -> None:
    base = {"model": "demo", "data": "demo", "output_dir": "x"}
    settings = load_settings(base=base, assignments=[f"peft_config.{assignment}"])
    assert getattr(settings.config.peft_config, field) == value


@pytest.mark.parametrize(
    ("assignment", "phrase"),
    [
        ("layers_to_transform=one", "an integer or a list of integers"),
        ("layers_to_transform=[1.5]", "an integer or a list of integers"),
        ("rank_pattern={o_proj: two}", "a mapping from names to whole numbers"),
        ("rank_pattern={o_proj: 2.5}", "a mapping from names to whole numbers"),
        ("rank_pattern=[1]", "a mapping from names to whole numbers"),
        ("rank_pattern={o_proj: 0}", "must hold numbers > 0"),
        ("init_lora_weights=gaussian", "true, pissa, pissa_niter_N or olora"),
        ("init_lora_weights=false", "true, pissa, pissa_niter_N or olora"),
        ("bias=some", "none, all or lora_only"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(assignment: str, phrase: str) -> None:
    base = {"model": "demo", "data": "demo", "output_dir": "x"}
    with pytest.raises(ConfigError) as problem:
        load_settings(base=base, assignments=[f"peft_config.{assignment}"])
    assert phrase in str(problem.value)
