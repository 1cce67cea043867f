"""A base model before an engine opens it."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_lora.engine.request import LoadRequest
from phi3_lora.inference.base_model import find_base_model
from phi3_lora.inference.loading import check_base_model
from phi3_lora.models.weights import read_model_files
from tests.tiny import write_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), dtype="bfloat16")


def test_a_model_is_found_without_weights_and_checked_with_them(
    model: Path, tmp_path: Path
) -> None:
    found = find_base_model(str(model))
    checked = check_base_model(found)
    assert checked.files == read_model_files(model)
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert find_base_model(str(tmp_path)).config == found.config


def test_an_adapters_template_makes_a_new_model_and_leaves_the_first_alone(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    base = find_base_model(str(model))
    adapted = base.with_adapter_template(tmp_path / "own.jinja")
    assert adapted.tokenizer.has_own_template and not base.tokenizer.has_own_template
    assert adapted.tokenizer.template.source == TEMPLATE
    assert base.with_adapter_template(None) is base


def test_a_template_of_the_user_overrides_the_adapters_template(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    named = find_base_model(str(model), chat_template=str(tmp_path / "own.jinja"))
    assert named.with_adapter_template(tmp_path / "missing.jinja") is named


@pytest.mark.parametrize(
    ("dtype", "gpu_dtype", "on_gpu", "expected"),
    [
        ("float16", "bfloat16", True, "float16"),
        ("auto", None, False, "float32"),
        ("auto", "float16", False, "float32"),
        ("auto", "float16", True, "float16"),
        ("auto", None, True, "bfloat16"),
    ],
)
def test_auto_is_the_wish_or_the_models_own_dtype_on_a_gpu_and_float32_elsewhere(
    model: Path, dtype: str, gpu_dtype: str | None, on_gpu: bool, expected: str
) -> None:
    request = LoadRequest(model=read_model_files(model), dtype=dtype, gpu_dtype=gpu_dtype)
    assert request.compute_dtype(on_gpu=on_gpu) == expected
