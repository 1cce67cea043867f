"""The run folder: its lock and its configuration."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from phi3_lora.config.load import read_yaml
from phi3_lora.config.schema import RunConfig
from phi3_lora.errors import RunFolderError, listing
from phi3_lora.storage.atomic import explained, replace_file

CONFIG_NAME = "config.yaml"
LOCK_NAME = ".lock"

_MAY_CHANGE = {
    *("backend", "device", "dtype", "output_dir"),
    *("training_config.per_device_train_batch_size", "training_config.gradient_accumulation_steps"),
    *("training_config.logging_steps", "training_config.gradient_checkpointing"),
    *("training_config.eval_strategy", "training_config.eval_steps"),
    *("training_config.save_strategy", "training_config.save_steps"),
    *("training_config.save_total_limit", "training_config.bf16", "training_config.fp16"),
    "training_config.torch_compile",
    # check_belongs compares the contents; the names may change.
    *("model", "revision", "quantize", "data.train", "data.valid", "data.sources"),
    *("data.format", "data.columns", "data.split", "data.subset", "data.on_bad_row"),
}


@contextlib.contextmanager
def locked(run_dir: Path, *, resume: bool) -> Iterator[None]:
    """Lock the run folder for this process; remove the folder if it was made here and stays empty.

    Raises:
        RunFolderError: when another process uses the folder, when it holds another run or other
            files, or when there is no run to resume.
    """
    existed = run_dir.exists()
    if existed and not run_dir.is_dir():
        raise RunFolderError(f"{run_dir} is a file: choose another --output")
    has_run = (run_dir / CONFIG_NAME).exists()
    if resume and not has_run:
        raise RunFolderError(f"{run_dir} holds no run to resume: leave out --resume to start one")
    if not resume and existed and any(p.name != LOCK_NAME for p in run_dir.iterdir()):
        raise RunFolderError(
            f"{run_dir} already holds another run: choose another --output, or --resume to "
            "continue it"
            if has_run
            else f"{run_dir} already holds other files: choose another --output"
        )
    with explained(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / LOCK_NAME, "w")  # noqa: SIM115 - the lock lives as long as the file
    try:
        # flock, not the file's existence: the kernel drops it even on SIGKILL.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RunFolderError(
            f"another process is training into {run_dir}: wait for it or choose another --output"
        ) from None
    try:
        yield
    finally:
        if not existed and not any(p.name != LOCK_NAME for p in run_dir.iterdir()):
            shutil.rmtree(run_dir, ignore_errors=True)
        lock.close()


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write the resolved configuration."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    replace_file(run_dir / CONFIG_NAME, text.encode())


def read_config(run_dir: Path) -> dict[str, Any]:
    """Read the stored configuration.

    Raises:
        RunFolderError: when the folder holds no configuration.
    """
    if not (run_dir / CONFIG_NAME).exists():
        raise RunFolderError(f"{run_dir} holds no run to resume: leave out --resume to start one")
    return read_yaml(run_dir / CONFIG_NAME)


def check_same_run(stored: RunConfig, now: RunConfig) -> None:
    """Check that the settings of a resumed run describe the stored run.

    Raises:
        RunFolderError: with every setting that differs but must not.
    """
    old, new = _flat(stored.to_dict()), _flat(now.to_dict())
    problems = [
        f"{name}: the run has {old[name]!r}, now {new[name]!r}"
        for name in old
        if name not in _MAY_CHANGE and old[name] != new[name]
    ]
    before = stored.training_config.documents_per_step
    after = now.training_config.documents_per_step
    if before != after:
        problems.append(
            "per_device_train_batch_size x gradient_accumulation_steps: "
            f"the run takes {before} documents a step, now {after}"
        )
    if problems:
        problems.append("to train on with other settings, start a new run with --adapter")
        raise RunFolderError(listing("cannot resume with another configuration:", problems))


def _flat(raw: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in raw.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            flat[name] = value
    return flat
