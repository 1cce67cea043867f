"""What is asked of the hub, without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phi3_lora.errors import ModelError
from phi3_lora.hub import resolve_model_dir


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The arguments of the download."""
    found: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        found.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return found


def test_weights_and_no_code_are_downloaded(asked: dict[str, Any], tmp_path: Path) -> None:
    assert resolve_model_dir("microsoft/Phi-3-mini-4k-instruct", "main") == tmp_path
    assert asked["revision"] == "main"
    assert asked["allow_patterns"] == ["*.json", "*.jinja", "*.safetensors"]


def test_a_look_downloads_no_weights(asked: dict[str, Any]) -> None:
    resolve_model_dir("microsoft/Phi-3-mini-4k-instruct", with_weights=False)
    assert asked["allow_patterns"] == ["*.json", "*.jinja"]


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="revision 'v1' has no meaning"):
        resolve_model_dir(str(tmp_path), "v1")


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/a/b", "~/nowhere/x", "a/b/c"])
def test_what_is_no_hub_id_is_not_asked_for(asked: dict[str, Any], name: str) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        resolve_model_dir(name)
    assert not asked


def test_an_unreachable_hub_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> str:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match="the hub cannot give it: no route to host"):
        resolve_model_dir("microsoft/Phi-3-mini-4k-instruct")
