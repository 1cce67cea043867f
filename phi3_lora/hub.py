"""From what a user calls a model to a folder with its files."""

from __future__ import annotations

import re
from pathlib import Path

from phi3_lora.demo import DEMO_MODEL_DIR
from phi3_lora.errors import ModelError

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_FILES = ["*.json", "*.jinja"]


def resolve_model_dir(
    model: str, revision: str | None = None, *, with_weights: bool = True
) -> Path:
    """The folder of `demo`, of a path, or of a hub id (downloaded into the hub's cache).

    Only configuration, tokenizer, template and safetensors files are downloaded, never code; the
    last only with_weights.

    Raises:
        ModelError: when there is no such folder and the hub has no such model or is out of reach.
    """
    folder = DEMO_MODEL_DIR if model == "demo" else Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(
                f"revision {revision!r} has no meaning for {model}: only a hub id has one"
            )
        return folder
    if not _HUB_ID.match(model) or folder.exists() or model.startswith((".", "/", "~")):
        raise ModelError(f"no such model folder: {model} (a folder, a hub id, or demo)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_FILES, "*.safetensors"] if with_weights else _FILES
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ModelError(
            f"no folder {model}, and the hub cannot give it: {first_line} (check the name; gated "
            "models need HF_TOKEN, offline machines a cached copy or a folder)"
        ) from None
