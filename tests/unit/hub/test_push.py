"""Uploads to a stand-in for the hub, each in another process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.folder import read_adapter, write_adapter_folder
from phi3_lora.storage.safetensors import encode
from tests.hub_stand_in import TOKEN, Hub, running_hub
from tests.tiny import random_adapter

REPO = "ada/orders"
CARD = b"---\nlibrary_name: peft\nbase_model: microsoft/Phi-3-mini-4k-instruct\n---\n# Mine\n"
SHAPES = {"model.layers.0.self_attn.qkv_proj": (12, 8), "model.layers.1.mlp.down_proj": (8, 16)}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def write_adapter(folder: Path, *, seed: int = 1, to: str = "both", value: float = 0.5) -> Path:
    """Write an adapter with a card; each seed gives different weights."""
    weights = random_adapter(SHAPES, r=2, seed=seed)
    weights["base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"][0, 0] = value
    adapter = Adapter(
        weights=weights,
        r=2,
        lora_alpha=4.0,
        num_layers=2,
        base_model="microsoft/Phi-3-mini-4k-instruct",
    )
    write_adapter_folder(folder, adapter, to=to, files={"README.md": CARD})
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    # mlx-lm's layout cannot hold modules that differ from layer to layer.
    return write_adapter(tmp_path / "adapter", to="peft")


def test_a_pushed_adapter_is_pulled_unchanged(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    done = hub.run(tmp_path / "writer", ["push", adapter, REPO, "--message", "first", "--json"])
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["url"] == f"{hub.url}/{REPO}"
    assert facts["files"] == ["adapter_config.json", "adapter_model.safetensors", "README.md"]
    assert hub.repos[REPO].messages == ["first"]
    sent = hub.repos[REPO].files()
    assert all(sent[name] == (adapter / name).read_bytes() for name in facts["files"])
    seen = hub.run(tmp_path / "reader", ["inspect", REPO, "--json"])
    assert seen.returncode == 0, seen.stderr
    pulled = read_adapter(Path(json.loads(seen.stdout)["path"]))
    for name, value in read_adapter(adapter).weights.items():
        assert np.array_equal(pulled.weights[name], value), name


def test_the_token_is_sent_and_neither_shown_nor_stored(
    hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    done = hub.run(tmp_path / "cache", ["push", adapter, REPO, "--debug"])
    refused = hub.run(tmp_path / "cache", ["push", adapter, "stranger/x", "--debug"])
    assert (done.returncode, refused.returncode) == (0, 2), done.stderr + refused.stderr
    sent = {a for _, path, a in hub.requests if path.startswith("/api/")}
    assert sent == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr + refused.stdout + refused.stderr
    stored = [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert stored == [] and not any(TOKEN.encode() in v for v in hub.repos[REPO].files().values())


def test_only_the_adapters_own_files_are_sent(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    (adapter / ".env").write_text("SECRET=1")
    (adapter / "optimizer.safetensors").write_bytes(encode({"m": np.zeros(2, np.float32)}))
    (adapter / "train.jsonl").write_text("{}")
    (adapter / "checkpoint-1").mkdir()
    (adapter / "checkpoint-1" / "adapter_config.json").write_text("{}")
    assert hub.run(tmp_path / "cache", ["push", adapter, REPO]).returncode == 0
    own = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert set(hub.repos[REPO].files()) == own | {".gitattributes"}


def test_a_second_push_updates_and_deletes_what_the_adapter_no_longer_has(
    hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    assert hub.run(tmp_path / "cache", ["push", adapter, REPO]).returncode == 0
    repo = hub.repos[REPO]
    # Files of an earlier adapter in both layouts, and one file of the user.
    repo.commit("main", repo.files() | {"adapters.safetensors": b"old", "notes.txt": b"mine"})
    before = len(repo.commits)
    again = write_adapter(tmp_path / "new", seed=2, to="peft")
    done = hub.run(tmp_path / "cache", ["push", again, REPO, "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["removed"] == ["adapters.safetensors"]
    assert len(repo.commits) == before + 1, "one commit"
    files = repo.files()
    assert files["notes.txt"] == b"mine" and "adapters.safetensors" not in files
    weights = (again / "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == weights


def test_a_missing_branch_is_made(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    done = hub.run(tmp_path / "cache", ["push", adapter, REPO, "--revision", "v2"])
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/{REPO}/tree/v2" in done.stdout and f"--adapter {REPO}@v2" in done.stdout
    repo = hub.repos[REPO]
    assert "adapter_config.json" in repo.files("v2")
    assert "adapter_config.json" not in repo.files("main")


def test_private_makes_a_private_repository_and_refuses_a_public_one(
    hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    assert hub.run(tmp_path / "cache", ["push", adapter, REPO, "--private"]).returncode == 0
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    before = len(hub.repos[REPO].commits)
    again = hub.run(tmp_path / "cache", ["push", adapter, REPO, "--private"])
    assert again.returncode == 2 and "exists and is public" in again.stderr
    assert len(hub.repos[REPO].commits) == before


def test_a_damaged_adapter_is_refused_before_anything_is_sent(
    hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    with_nan = write_adapter(tmp_path / "nan", to="peft", value=float("nan"))
    found = hub.run(tmp_path / "cache", ["push", with_nan, REPO])
    assert found.returncode == 2 and "is damaged" in found.stderr, found.stderr
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    found = hub.run(tmp_path / "cache", ["push", adapter, REPO])
    assert found.returncode == 2 and str(weights) in found.stderr, found.stderr
    assert hub.requests == [] and hub.repos == {}


@pytest.mark.parametrize(
    ("token", "phrase"),
    [
        ("hf_wrong", "does not accept the token"),
        (None, "no token: make one with write access"),
        ("hf_with\x07bell", "characters that no token has"),
    ],
)
def test_an_unusable_token_exits_2(
    hub: Hub, adapter: Path, tmp_path: Path, token: str | None, phrase: str
) -> None:
    found = hub.run(tmp_path / "cache", ["push", adapter, REPO], token=token)
    assert found.returncode == 2 and phrase in found.stderr, found.stderr
    assert token is None or token not in found.stderr
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("part", "status", "phrase"),
    [
        ("/commit/", 403, "may not write there"),
        ("/preupload/", 404, "no such repository, owner or branch"),
        ("/blobs/", 413, "refuses files of this size"),
        ("/commit/", 500, "an internal fault"),
        ("/repos/create", 418, "the hub refuses it"),
    ],
)
def test_a_refusal_is_one_line_with_the_next_step(
    hub: Hub, adapter: Path, tmp_path: Path, part: str, status: int, phrase: str
) -> None:
    hub.failing[part] = status
    found = hub.run(tmp_path / "cache", ["push", adapter, REPO])
    assert found.returncode == 2 and phrase in found.stderr, found.stderr
    assert found.stderr.count("\n") == 1 and f"cannot push to {REPO}: " in found.stderr


def test_a_hub_out_of_reach_and_an_offline_machine_exit_2(
    hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    # Nothing listens on port 9, which is reserved for discarding.
    away = hub.run(tmp_path / "cache", ["push", adapter, REPO], HF_ENDPOINT="http://127.0.0.1:9")
    assert away.returncode == 2 and "out of reach" in away.stderr, away.stderr
    offline = hub.run(tmp_path / "cache", ["push", adapter, REPO], HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE is set" in offline.stderr
    assert hub.requests == []


def test_files_that_the_repository_ignores_are_reported(
    hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    hub.ignored = ("README.md",)
    found = hub.run(tmp_path / "cache", ["push", adapter, REPO])
    assert found.returncode == 2 and "did not take README.md" in found.stderr, found.stderr
