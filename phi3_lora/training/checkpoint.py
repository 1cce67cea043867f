"""Checkpoints: everything that a run needs to resume.

A folder such as step-000100 holds the adapter in PEFT's format, optimizer.safetensors, state.json
and manifest.json, which has the sha256 of the other files and is written last. A folder whose
manifest does not match its files is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.config_file import CONFIG_NAME
from phi3_lora.adapters.formats.peft import WEIGHTS_NAME, peft_config
from phi3_lora.arrays import Tensors
from phi3_lora.errors import CheckpointError, listing
from phi3_lora.storage.atomic import replace_folder, write_bytes
from phi3_lora.storage.safetensors import encode, read_all_float32

OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
MANIFEST_NAME = "manifest.json"
_FOLDER = re.compile(r"^step-(\d{6,})$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint in memory."""

    path: Path
    weights: Tensors
    """The adapter under PEFT's names."""
    optimizer: Tensors
    """Moments under the adapter's names with the suffix .exp_avg or .exp_avg_sq."""
    state: dict[str, Any]
    """The content of state.json."""

    @property
    def step(self) -> int:
        """The last optimizer step taken."""
        return int(self.state["step"])


class CheckpointFolder:
    """The checkpoints of a run."""

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        """Take the folder RUN/checkpoints, which may not exist yet.

        Args:
            run_dir: the run folder.
            keep: number of newest checkpoints that a save keeps; 0 keeps all.
        """
        self.path = run_dir / "checkpoints"
        self._keep = keep

    def names(self) -> list[Path]:
        """Return the checkpoint folders, newest first, whole or damaged."""
        if not self.path.is_dir():
            return []
        found = [(int(m[1]), p) for p in self.path.iterdir() if (m := _FOLDER.match(p.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def save(self, adapter: Adapter, optimizer: Tensors, state: dict[str, Any]) -> Path:
        """Write a checkpoint under a temporary name, rename it, and delete the oldest ones.

        Raises:
            StorageError: when it cannot be written; the older checkpoints stay.
        """
        contents = {
            WEIGHTS_NAME: encode(adapter.weights),
            CONFIG_NAME: json.dumps(peft_config(adapter), indent=2).encode(),
            OPTIMIZER_NAME: encode(optimizer),
            STATE_NAME: json.dumps(state, indent=2).encode(),
        }
        manifest = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}

        def fill(part: Path) -> None:
            for name, data in contents.items():
                write_bytes(part / name, data)
            write_bytes(part / MANIFEST_NAME, json.dumps(manifest, indent=2).encode())

        folder = self.path / f"step-{state['step']:06d}"
        replace_folder(folder, fill)
        if self._keep:
            for old in [p for p in self.names() if p != folder][self._keep - 1 :]:
                shutil.rmtree(old, ignore_errors=True)
        return folder

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps; a run that resumes writes them again."""
        for path in self.names():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path, ignore_errors=True)

    def newest_whole(self) -> tuple[Checkpoint | None, list[str]]:
        """Load the newest whole checkpoint.

        Returns:
            The checkpoint, or None where no folder exists; and a text on each damaged newer one.

        Raises:
            CheckpointError: when there are checkpoints, but all are damaged.
        """
        problems: list[str] = []
        for path in self.names():
            try:
                return load_checkpoint(path), problems
            except CheckpointError as problem:
                problems.append(str(problem))
        if problems:
            raise CheckpointError(listing(f"no whole checkpoint in {self.path}:", problems))
        return None, problems


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint and check the sha256 of every file.

    Raises:
        CheckpointError: when a file is missing or was changed.
    """
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text())
        if not isinstance(manifest, dict):
            raise CheckpointError(f"{path.name}: the manifest is not a JSON object")
        missing = {WEIGHTS_NAME, CONFIG_NAME, OPTIMIZER_NAME, STATE_NAME} - set(manifest)
        if missing:
            raise CheckpointError(f"{path.name}: the manifest lacks {', '.join(sorted(missing))}")
        for name, expected in manifest.items():
            if hashlib.sha256((path / name).read_bytes()).hexdigest() != expected:
                raise CheckpointError(f"{path.name}: {name} does not have the recorded sha256")
        state = json.loads((path / STATE_NAME).read_text())
    except CheckpointError:
        raise
    except FileNotFoundError as cause:
        raise CheckpointError(f"{path.name}: {Path(cause.filename).name} is missing") from None
    except (OSError, ValueError, AttributeError) as cause:
        raise CheckpointError(f"{path.name}: {cause}") from None
    return Checkpoint(
        path,
        read_all_float32(path / WEIGHTS_NAME, CheckpointError),
        read_all_float32(path / OPTIMIZER_NAME, CheckpointError),
        state,
    )
