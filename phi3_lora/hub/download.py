"""Lookup of model and adapter folders by path or hub id, with download."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from phi3_lora.demo import DEMO_MODEL_DIR
from phi3_lora.errors import AdapterError, ConfigError, ModelError, Phi3LoraError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""A hub id: owner/name."""
_FILES = ["*.json", "*.jinja"]
_ADAPTER_FILES = [
    *("adapter_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("README.md", "chat_template.jinja"),
]
_NO_ADAPTER_FILES = ["*/*", "model*.safetensors*", "consolidated*.safetensors*"]
"""Subfolders (checkpoints, merged copies) and the weights of a whole model beside an adapter."""
_REASONS = {
    401: "the hub does not accept HF_TOKEN or the stored login, or it is private or does not exist",
    403: "the token may not read it",
    404: "the hub has nothing of that name that this token may see",
    429: "too many requests, wait a little and try again",
}
"""HTTP status -> its meaning for a download."""


def resolve_model_dir(
    model: str, revision: str | None = None, *, with_weights: bool = True
) -> Path:
    """Return the folder of a base model, downloaded into the hub's cache if needed.

    Only configuration, tokenizer, template and safetensors files are downloaded, never code.

    Args:
        model: a folder, a hub id, or demo.
        revision: branch, tag or commit of a hub id.
        with_weights: whether to download the safetensors files.

    Raises:
        ConfigError: when HF_TOKEN cannot be a token.
        ModelError: when there is no such folder, and the hub has no such model or is out of reach.
    """
    folder = DEMO_MODEL_DIR if model == "demo" else Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(
                f"revision {revision!r} has no meaning for {model}: only a hub id has one"
            )
        return folder
    if not HUB_ID.fullmatch(model) or folder.exists() or model.startswith((".", "/", "~")):
        raise ModelError(f"no such model folder: {model} (a folder, a hub id, or demo)")
    patterns = [*_FILES, "*.safetensors"] if with_weights else _FILES
    return _download(model, revision, patterns, error=ModelError)


def resolve_adapter_dir(adapter: str, revision: str | None = None) -> Path:
    """Return the path of an adapter, downloaded into the hub's cache if needed.

    Only the adapter's own files at the top of the repository are downloaded: config, safetensors,
    template and model card, never code or pickled weights.

    Args:
        adapter: a path, owner/name, or owner/name@revision.
        revision: branch, tag or commit of a hub id, if the name holds none.

    Raises:
        AdapterError: when there is no such path, and the hub has no such adapter or is out of
            reach.
        ConfigError: when HF_TOKEN cannot be a token.
    """
    path = Path(adapter).expanduser()
    if path.exists():
        if revision is not None:
            raise AdapterError(
                f"revision {revision!r} has no meaning for {adapter}: only a hub id has one"
            )
        return path
    name, separator, own_revision = adapter.partition("@")
    is_named = bool(own_revision.strip()) or not separator
    if not HUB_ID.fullmatch(name) or not is_named or adapter.startswith((".", "~")):
        raise AdapterError(
            f"no such adapter folder: {adapter} (a folder, or a hub id: owner/name or "
            "owner/name@revision)"
        )
    if own_revision and revision not in (None, own_revision):
        raise AdapterError(f"{adapter} names another revision than {revision!r}: give one of them")
    folder = _download(
        name,
        own_revision or revision,
        _ADAPTER_FILES,
        ignored=_NO_ADAPTER_FILES,
        error=AdapterError,
    )
    missing = [p for p in ("adapter_config.json", "*.safetensors") if not any(folder.glob(p))]
    if missing:
        raise AdapterError(
            f"{name} on the hub holds no adapter that can be read: {' and '.join(missing)} missing "
            "(weights in .bin or .pt are never downloaded, since they can run code; ask the owner "
            "for safetensors)"
        )
    return folder


def _download(
    repo: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    ignored: Sequence[str] | None = None,
    error: type[Phi3LoraError],
) -> Path:
    """Download files of a repository into the hub's cache and return their folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    hub_token()
    at = "" if revision is None else f" at revision {revision}"
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*patterns],
                ignore_patterns=None if ignored is None else [*ignored],
            )
        )
    except network_errors(HFValidationError) as cause:
        raise error(
            f"no folder {repo}, and the hub cannot give it{at}: {hub_reason(cause)} (check the "
            "name; gated and private ones need HF_TOKEN, offline machines a cached copy or a "
            "folder)"
        ) from None


def hub_token() -> str | None:
    """Return the token of HF_TOKEN or of the stored login, which must not be shown or stored.

    Raises:
        ConfigError: when it cannot be a token; the HTTP library would print it in its own error.
    """
    from huggingface_hub import get_token

    token = get_token()
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(
            "HF_TOKEN (or the stored login) holds spaces or characters that no token has: copy it "
            "again from https://huggingface.co/settings/tokens"
        )
    return token


def network_errors(*others: type[BaseException]) -> tuple[type[BaseException], ...]:
    """Return others and the errors of huggingface_hub for a refused or failed request."""
    from huggingface_hub.errors import HfHubHTTPError

    # The base of HfHubHTTPError is the root of the errors of the HTTP library, requests or httpx.
    return (*others, OSError, *HfHubHTTPError.__bases__)


def http_status(cause: BaseException | None) -> int | None:
    """Return the HTTP status behind an error of huggingface_hub; None if no answer came."""
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        cause = cause.__cause__
    return None


def hub_reason(cause: BaseException) -> str:
    """Return the reason in one line why the hub did not give the files."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    status = http_status(cause)
    chain = (cause, cause.__cause__)
    if any(isinstance(step, RevisionNotFoundError) for step in chain):
        return f"it has no such revision (HTTP {status})"
    if any(isinstance(step, GatedRepoError) for step in chain):
        return f"it is gated, ask for access on its page (HTTP {status})"
    if status in _REASONS:
        return f"{_REASONS[status]} (HTTP {status})"
    if isinstance(cause, LocalEntryNotFoundError) and HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the cache does not hold it"
    return first_line(cause)


def first_line(cause: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has no message."""
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
