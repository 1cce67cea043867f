"""Downloads from the hub, with replaced functions and with a stand-in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.folder import write_adapter_folder
from phi3_lora.errors import AdapterError, ConfigError, ModelError
from phi3_lora.hub.download import resolve_adapter_dir, resolve_model_dir
from tests.e2e.program import phi3_lora_here
from tests.hub_stand_in import TOKEN, Hub, Repo, running_hub
from tests.tiny import random_adapter


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Record the arguments of the download."""
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


def test_without_weights_only_configs_and_templates_are_downloaded(asked: dict[str, Any]) -> None:
    resolve_model_dir("microsoft/Phi-3-mini-4k-instruct", with_weights=False)
    assert asked["allow_patterns"] == ["*.json", "*.jinja"]


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="revision 'v1' has no meaning"):
        resolve_model_dir(str(tmp_path), "v1")


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/a/b", "~/nowhere/x", "a/b/c"])
def test_a_name_that_is_not_a_hub_id_is_not_requested(asked: dict[str, Any], name: str) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        resolve_model_dir(name)
    assert not asked


def test_an_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> str:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match="the hub cannot give it: no route to host"):
        resolve_model_dir("microsoft/Phi-3-mini-4k-instruct")


def test_an_invalid_token_is_reported_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\x07bell")
    with pytest.raises(ConfigError, match="characters that no token has") as caught:
        resolve_model_dir("microsoft/Phi-3-mini-4k-instruct")
    assert "hf_secret" not in str(caught.value)


def test_an_existing_adapter_is_not_requested(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ada/orders", "ada/orders@v1"):
        (tmp_path / name).mkdir(parents=True)
        assert resolve_adapter_dir(name) == Path(name)
    (tmp_path / "adapter.pt").touch()
    assert resolve_adapter_dir("adapter.pt") == Path("adapter.pt")
    assert not asked


@pytest.mark.parametrize(
    "name", ["nowhere", "./a/b", "/a/b", "~/nowhere/x", "a/b/c", "a/b@", "a/b\n", "a b/c"]
)
def test_an_adapters_name_that_is_not_a_hub_id_is_not_requested(
    asked: dict[str, Any], name: str
) -> None:
    with pytest.raises(AdapterError, match=r"(?s)no such adapter folder: .*owner/name@revision"):
        resolve_adapter_dir(name)
    assert not asked


def test_a_revision_of_an_adapter_is_given_once_and_not_of_a_folder(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="revision 'v1' has no meaning"):
        resolve_adapter_dir(str(tmp_path), "v1")
    with pytest.raises(AdapterError, match="names another revision than 'v1'"):
        resolve_adapter_dir("ada/orders@v2", "v1")
    assert not asked


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with an adapter, and files beside it that must not be downloaded."""
    adapter = Adapter(
        weights=random_adapter({"model.layers.0.self_attn.qkv_proj": (12, 8)}, r=2),
        r=2,
        lora_alpha=4.0,
        num_layers=1,
    )
    write_adapter_folder(tmp_path / "source", adapter)
    files = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    others = (
        *("evil.py", "adapter_model.bin", "adapter.pt", "model.safetensors", "tokenizer.json"),
        *("model.safetensors.index.json", "checkpoint-1/adapter_model.safetensors"),
    )
    with running_hub() as hub:
        repo = hub.repos["ada/orders"] = Repo()
        repo.commit("v1", files | {name: b"not wanted" for name in others})
        repo.commit("main", repo.files("v1") | {"README.md": b"# Newer"})
        hub.repos["ada/pickled"] = Repo()
        hub.repos["ada/pickled"].commit(
            "main", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}
        )
        hub.repos["ada/hidden"] = Repo(private=True)
        yield hub


def pull(hub: Hub, cache: Path, name: str, **changes: str | None) -> Path:
    seen = hub.run(cache, ["inspect", name, "--json"], **changes)
    assert seen.returncode == 0, seen.stderr
    return Path(json.loads(seen.stdout)["path"])


def test_only_an_adapters_own_files_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    folder = pull(hub, tmp_path / "cache", "ada/orders", token=None)
    wanted = {"adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"}
    assert {p.name for p in folder.rglob("*")} == wanted | {"README.md"}
    fetched = {Path(path).name for method, path, _ in hub.requests if "/resolve/" in path}
    assert fetched == wanted | {"README.md"}
    assert not any(b"not wanted" in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_a_revision_in_the_name_is_used(hub: Hub, tmp_path: Path) -> None:
    assert (pull(hub, tmp_path, "ada/orders") / "README.md").read_text() == "# Newer"
    assert not (pull(hub, tmp_path, "ada/orders@v1") / "README.md").exists()


def test_a_downloaded_adapter_is_used_offline(hub: Hub, tmp_path: Path) -> None:
    folder = pull(hub, tmp_path / "cache", "ada/orders")
    assert pull(hub, tmp_path / "cache", "ada/orders", HF_HUB_OFFLINE="1") == folder


@pytest.mark.parametrize(
    ("name", "changes", "phrase"),
    [
        ("ada/nothing", {}, "nothing of that name"),
        ("ada/hidden", {"token": None}, "nothing of that name"),
        ("ada/orders@v9", {}, "at revision v9: it has no such revision"),
        ("ada/orders", {"token": "hf_wrong"}, "does not accept HF_TOKEN"),
        ("ada/orders", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("ada/orders", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot give it"),
        ("ada/pickled", {}, "holds no adapter that can be read: *.safetensors missing"),
    ],
)
def test_an_unavailable_adapter_exits_2(
    hub: Hub, tmp_path: Path, name: str, changes: dict[str, Any], phrase: str
) -> None:
    found = hub.run(tmp_path / "cache", ["inspect", name], **changes)
    assert found.returncode == 2 and phrase in found.stderr, found.stderr
    assert "Traceback" not in found.stderr and TOKEN not in found.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--model", "demo", "--data", "demo", "--adapter"],
        ["generate", "--model", "demo", "--prompt", "x", "--adapter"],
        ["parity", "--model", "demo", "--adapter"],
        ["merge", "--model", "demo", "--output", "merged", "--adapter"],
        ["train", "--model", "demo", "--data", "demo", "--output", "run", "--adapter"],
        ["convert", "--to", "peft", "out"],
        ["verify", "--model", "demo"],
        ["inspect"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_takes_an_adapter_of_the_hub(
    asked: dict[str, Any], tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requests are checked; the empty folder of the answer ends each command."""
    monkeypatch.chdir(tmp_path)
    at = 3 if arguments[0] == "convert" else len(arguments)
    found = phi3_lora_here(*arguments[:at], "ada/orders@v1", *arguments[at:])
    assert found.returncode == 2 and "ada/orders on the hub holds no adapter" in found.stderr
    assert (asked["model"], asked["revision"]) == ("ada/orders", "v1")
