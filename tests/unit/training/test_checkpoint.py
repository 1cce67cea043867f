from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.folder import read_adapter
from phi3_lora.errors import CheckpointError, StorageError
from phi3_lora.training import checkpoint as module
from phi3_lora.training.checkpoint import CheckpointFolder, load_checkpoint
from tests.tiny import random_adapter

SHAPES = {"model.layers.0.mlp.down_proj": (6, 5)}
FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "manifest.json"),
    *("optimizer.safetensors", "state.json"),
)


def save(folder: CheckpointFolder, step: int) -> Path:
    weights = random_adapter(SHAPES, r=2, seed=step)
    moments = {f"{name}.exp_avg": value * 2 for name, value in weights.items()}
    adapter = Adapter(weights=weights, r=2, lora_alpha=4.0)
    return folder.save(adapter, moments, {"step": step, "last_loss": 0.1 + 0.2})


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_saved_checkpoint_loads_bit_equal(tmp_path: Path) -> None:
    path = save(CheckpointFolder(tmp_path, keep=2), 100)
    assert path.name == "step-000100"
    assert sorted(p.name for p in path.iterdir()) == list(FILES)
    found = load_checkpoint(path)
    assert found.step == 100 and found.state == {"step": 100, "last_loss": 0.1 + 0.2}
    for name, value in random_adapter(SHAPES, r=2, seed=100).items():
        np.testing.assert_array_equal(found.weights[name], value)
        np.testing.assert_array_equal(found.optimizer[f"{name}.exp_avg"], value * 2)


def test_checkpoint_is_an_adapter_folder(tmp_path: Path) -> None:
    path = save(CheckpointFolder(tmp_path, keep=2), 3)
    assert read_adapter(path).scaling == 2.0


def test_the_checkpoint_just_written_is_kept_though_a_later_one_is_there(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 200)
    path = save(folder, 120)
    assert folder.names() == [path]


def test_checkpoints_after_a_step_are_dropped(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    paths = [save(folder, step) for step in (100, 120, 200)]
    folder.drop_after(120)
    assert folder.names() == [paths[1], paths[0]]


@pytest.mark.parametrize("name", FILES[:2] + FILES[3:])
@pytest.mark.parametrize("at", [0, -1])
def test_flipped_bit_falls_back_to_the_older_one(tmp_path: Path, name: str, at: int) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    save(folder, 1)
    save(folder, 2)
    flip(save(folder, 3) / name, at)
    found, problems = folder.newest_whole()
    assert found is not None and found.step == 2
    assert problems == [f"step-000003: {name} does not have the recorded sha256"]


@pytest.mark.parametrize("name", FILES)
def test_missing_file_falls_back_to_the_older_one(tmp_path: Path, name: str) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    save(folder, 1)
    (save(folder, 2) / name).unlink()
    found, problems = folder.newest_whole()
    assert found is not None and found.step == 1
    assert problems == [f"step-000002: {name} is missing"]


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "3"])
def test_bad_manifest_falls_back_to_the_older_one(tmp_path: Path, content: str) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    save(folder, 1)
    (save(folder, 2) / "manifest.json").write_text(content)
    found, problems = folder.newest_whole()
    assert found is not None and found.step == 1
    assert len(problems) == 1 and "step-000002" in problems[0]


def test_no_whole_checkpoint_is_an_error_that_lists_all(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    for step in (1, 2):
        flip(save(folder, step) / "state.json", 5)
    with pytest.raises(CheckpointError) as problem:
        folder.newest_whole()
    lines = str(problem.value).splitlines()
    assert "no whole checkpoint" in lines[0]
    assert "step-000002" in lines[1] and "step-000001" in lines[2]


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path, keep=2).newest_whole() == (None, [])


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [4, 3, 2, 1]), (1, [4]), (2, [4, 3]), (9, [4, 3, 2, 1])]
)
def test_newest_checkpoints_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    folder = CheckpointFolder(tmp_path, keep=keep)
    for step in (1, 2, 3, 4):
        save(folder, step)
    assert [p.name for p in folder.names()] == [f"step-{step:06d}" for step in left]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    for step in (999_999, 1_000_000, 5):
        save(folder, step)
    (folder.path / "step-000007.part").mkdir()
    names = ["step-1000000", "step-999999", "step-000005"]
    assert [p.name for p in folder.names()] == names


def test_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    flip(save(folder, 1) / "state.json", 3)
    save(folder, 1)
    found, problems = folder.newest_whole()
    assert found is not None and problems == []
    assert [p.name for p in folder.path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize(
    ("code", "phrase"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "cannot write")]
)
@pytest.mark.parametrize("file", FILES)
def test_failed_write_leaves_the_older_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, phrase: str, file: str
) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)
    whole = module.write_bytes

    def write(path: Path, data: bytes) -> Any:
        if path.name == file:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(code, "refused")
        return whole(path, data)

    monkeypatch.setattr(module, "write_bytes", write)
    with pytest.raises(StorageError, match=phrase):
        save(folder, 2)
    assert [p.name for p in folder.path.iterdir()] == ["step-000001"]
    found, problems = folder.newest_whole()
    assert found is not None and found.step == 1 and problems == []
