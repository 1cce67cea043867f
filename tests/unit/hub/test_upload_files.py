"""Choice of the files of an adapter that go to the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.folder import write_adapter_folder
from phi3_lora.errors import AdapterError
from phi3_lora.hub.upload_files import Upload, files_to_push
from tests.tiny import random_adapter

BASE = "microsoft/Phi-3-mini-4k-instruct"
SHAPES = {f"model.layers.{i}.self_attn.qkv_proj": (12, 8) for i in range(2)}
HEAD = f"library_name: peft\nbase_model: {BASE}\ntags:\n- lora\n"


def write(folder: Path, base: str | None = BASE, card: str | None = None) -> Path:
    adapter = Adapter(
        weights=random_adapter(SHAPES, r=2),
        r=2,
        lora_alpha=4.0,
        num_layers=2,
        base_model=base,
    )
    files = {} if card is None else {"README.md": card.encode()}
    write_adapter_folder(folder, adapter, files=files)
    return folder


def content(upload: Upload, name: str) -> str:
    value = upload.files[name]
    return value.decode() if isinstance(value, bytes) else value.read_text()


def config(upload: Upload) -> dict[str, Any]:
    found = json.loads(content(upload, "adapter_config.json"))
    assert isinstance(found, dict)
    return found


def head(upload: Upload) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", content(upload, "README.md"), re.DOTALL)
    assert match is not None
    found = yaml.safe_load(match[1])
    assert isinstance(found, dict)
    return found


def test_a_clean_folder_is_sent_unchanged(tmp_path: Path) -> None:
    upload = files_to_push(write(tmp_path / "a", card=f"---\n{HEAD}---\n# Mine\n"), "ada/x")
    assert upload.notes == ()
    assert upload.files == {
        name: tmp_path / "a" / name
        for name in (
            *("adapter_config.json", "adapter_model.safetensors"),
            *("adapters.safetensors", "README.md"),
        )
    }


@pytest.mark.parametrize("base", ["/home/ada/phi", "~/phi", "../phi", "C:\\phi", "a/b/c"])
def test_a_local_base_is_sent_as_null_and_left_out_of_the_card(tmp_path: Path, base: str) -> None:
    folder = write(tmp_path / "a", base)
    stored = (folder / "adapter_config.json").read_bytes()
    upload = files_to_push(folder, "ada/x")
    assert config(upload)["base_model_name_or_path"] is None and config(upload)["model"] is None
    assert "base_model" not in head(upload)
    assert all(base not in content(upload, n) for n in ("adapter_config.json", "README.md"))
    assert any("base_model_name_or_path is a local path" in text for text in upload.notes)
    assert (folder / "adapter_config.json").read_bytes() == stored, "the folder is not changed"


def test_a_base_of_two_parts_that_is_a_folder_here_is_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "a", "models/phi")
    assert head(files_to_push(folder, "ada/x"))["base_model"] == "models/phi"
    (tmp_path / "models" / "phi").mkdir(parents=True)
    assert config(files_to_push(folder, "ada/x"))["base_model_name_or_path"] is None


def test_a_path_in_the_hubs_cache_becomes_its_id(tmp_path: Path) -> None:
    cached = "/home/ada/.cache/huggingface/hub/models--microsoft--Phi-3-mini-4k-instruct"
    upload = files_to_push(write(tmp_path / "a", f"{cached}/snapshots/0a1b2c"), "ada/x")
    assert config(upload)["base_model_name_or_path"] == BASE == head(upload)["base_model"]


def test_other_local_paths_in_the_config_are_sent_as_null(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    path = folder / "adapter_config.json"
    stored = json.loads(path.read_text())
    more = {"data": "/home/ada/chats", "extra": {"paths": ["~/x"]}, "note": "a/b", "seed": 0}
    path.write_text(json.dumps(stored | more))
    assert config(files_to_push(folder, "ada/x")) == stored | {
        "data": None,
        "extra": None,
        "note": "a/b",
        "seed": 0,
    }


def test_a_missing_card_is_made_with_the_head_that_the_hub_reads(tmp_path: Path) -> None:
    upload = files_to_push(write(tmp_path / "a"), "ada/orders")
    assert head(upload) == {"library_name": "peft", "tags": ["lora", "phi-3"], "base_model": BASE}
    text = content(upload, "README.md")
    assert "# orders" in text and "| Rank, alpha | 2, 4 |" in text and "`qkv_proj`" in text
    assert f"--model {BASE} --adapter ada/orders" in text


def test_the_name_of_the_built_in_model_is_left_out_of_the_card(tmp_path: Path) -> None:
    card = "---\nlibrary_name: peft\nbase_model: demo\n---\n# Mine\n"
    upload = files_to_push(write(tmp_path / "a", "demo", card), "ada/x")
    assert head(upload) == {"library_name": "peft"}
    assert any("'demo' is not a hub id" in text for text in upload.notes)


def test_a_card_of_peft_loses_only_its_local_base(tmp_path: Path) -> None:
    card = (
        "---\nbase_model: /home/ada/phi\nlibrary_name: peft\nlicense: mit\ntags:\n"
        "- base_model:adapter:/home/ada/phi\n- lora\n---\n# Gr\u00fc\u00dfe\n\nOf /home/ada/phi.\n"
    )
    upload = files_to_push(write(tmp_path / "a", "/home/ada/phi", card), "ada/x")
    assert head(upload) == {"library_name": "peft", "license": "mit", "tags": ["lora"]}
    assert content(upload, "README.md").endswith("---\n# Gr\u00fc\u00dfe\n\nOf phi.\n")


def test_a_changed_card_keeps_keys_whose_value_is_null(tmp_path: Path) -> None:
    card = "---\nlibrary_name: peft\nlicense: null\nbase_model: demo\n---\n# Mine\n"
    upload = files_to_push(write(tmp_path / "a", "demo", card), "ada/x")
    assert content(upload, "README.md") == ("---\nlibrary_name: peft\nlicense: null\n---\n# Mine\n")


def test_paths_in_the_card_of_a_training_run_are_shortened(tmp_path: Path) -> None:
    rows = (
        "| Base model | `microsoft/Phi-3-mini-4k-instruct` |\n"
        "| Training data | `{}chats.jsonl`: 8 documents |\n| Seed | `/api/chat` |\n"
    )
    card = f"---\n{HEAD}---\n{rows}"
    upload = files_to_push(write(tmp_path / "a", card=card.format("/home/ada/")), "ada/x")
    assert content(upload, "README.md") == card.format("")


def test_a_card_without_a_head_gets_one(tmp_path: Path) -> None:
    upload = files_to_push(write(tmp_path / "a", card="# Mine\n"), "ada/x")
    assert head(upload) == {"library_name": "peft", "base_model": BASE}
    assert content(upload, "README.md").endswith("---\n# Mine\n")


@pytest.mark.parametrize(
    ("card", "phrase"),
    [
        ("---\ntags: [\n---\n", "is not YAML"),
        ("---\n- lora\n---\n", "must be names with values, got list"),
        ("---\ntags: lora\n", "has no end line"),
        ("---\nbase_model: 3\n---\n", "base_model must be texts, got 3"),
    ],
)
def test_a_head_that_the_hub_cannot_read_is_refused(tmp_path: Path, card: str, phrase: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(phrase)) as caught:
        files_to_push(write(tmp_path / "a", card=card), "ada/x")
    assert "README.md" in str(caught.value) and "mend it" in str(caught.value)


def test_weights_under_other_names_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "mine.safetensors")
    with pytest.raises(AdapterError, match=r"weights in mine\.safetensors.*convert"):
        files_to_push(folder, "ada/x")


def test_a_damaged_fingerprint_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "fingerprint.safetensors").write_bytes(weights)
    with pytest.raises(AdapterError, match=r"fingerprint\.safetensors is damaged"):
        files_to_push(folder, "ada/x")


def test_an_adapter_that_changes_nothing_gets_a_note(tmp_path: Path) -> None:
    weights = random_adapter(SHAPES, r=2)
    zero = {n: v * 0 if "lora_B" in n else v for n, v in weights.items()}
    write_adapter_folder(tmp_path / "a", Adapter(weights=zero, r=2, lora_alpha=4.0), to="peft")
    assert "this adapter changes nothing: every delta is 0" in (
        files_to_push(tmp_path / "a", "ada/x").notes
    )
