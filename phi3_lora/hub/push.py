"""Upload of an adapter to the Hugging Face hub, in one commit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phi3_lora.errors import ConfigError, Phi3LoraError, StorageError
from phi3_lora.hub.download import HUB_ID, http_status, hub_token, network_errors
from phi3_lora.hub.upload_files import OWN_FILES, files_to_push

_TOKENS = "https://huggingface.co/settings/tokens"
_REASONS = {
    401: f"the hub does not accept the token: make one with write access at {_TOKENS} and set "
    "HF_TOKEN, or run hf auth login",
    402: "the owner's plan does not allow this: see the billing page of the account",
    403: "the token may not write there: use one with write access to the owner's repositories, or "
    "push under a name of your own",
    404: "the hub has no such repository, owner or branch that this token may see: check the name",
    409: "another upload is in the way: wait for it and push again",
    412: "another upload is in the way: wait for it and push again",
    413: "the hub refuses files of this size: see the owner's storage limits",
    429: "too many requests: wait a little and push again",
}
"""HTTP status -> its meaning for an upload, and the next step."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """Result of a push."""

    url: str
    """Address of the repository's page, or of the branch if one was given."""
    commit: str
    """The commit that holds the adapter."""
    files: tuple[str, ...]
    removed: tuple[str, ...]
    """Files of an earlier adapter, which this adapter does not have."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values of --json."""
        return asdict(self)


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    note: Callable[[str], None],
) -> Pushed:
    """Upload an adapter folder to the hub; create the repository and the branch if missing.

    The whole adapter is read and checked first. Only OWN_FILES are sent, in one commit. The commit
    also deletes OWN_FILES of an earlier adapter that this adapter does not have: files of two
    adapters would contradict each other. Other files of the repository stay.

    Args:
        folder: the adapter's folder.
        repo: owner/name.
        private: make a new repository private, and refuse an existing public one.
        revision: the branch; None is main.
        message: the message of the commit.
        note: receives a text on each file that is sent changed.

    Raises:
        AdapterError: when the adapter is damaged.
        ConfigError: when the name, the token or the message cannot be used, HF_HUB_OFFLINE is
            set, or private is asked for and the repository is public.
        StorageError: when the hub refuses or is out of reach.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    token = _checked(repo, message)
    upload = files_to_push(folder, repo)
    for text in upload.notes:
        note(text)
    api = HfApi(token=token, library_name="phi3-lora", library_version=version("phi3-lora"))
    with _explained(repo):
        # None, not False: an organisation may make its repositories private by default.
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ConfigError(
                f"{repo} exists and is public, so nothing was sent: make it private in its "
                "settings, choose another name, or leave out --private"
            )
        present = _names_on(api, repo, revision)
        removed = tuple(n for n in OWN_FILES if n in present and n not in upload.files)
        # With hf_xet installed, upload_folder would make several commits.
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, content) for name, content in upload.files.items()),
                *(CommitOperationDelete(name) for name in removed),
            ],
            commit_message=message or f"LoRA adapter, by phi3-lora {version('phi3-lora')}",
            revision=revision,
        )
        arrived = set(api.list_repo_files(repo, revision=done.oid))
    _check_arrived(repo, upload.files, arrived)
    url = "/".join([api.endpoint, repo, *(["tree", revision] if revision else [])])
    return Pushed(url, done.oid, tuple(upload.files), removed)


def _check_arrived(repo: str, sent: Iterable[str], arrived: set[str]) -> None:
    left_out = [name for name in sent if name not in arrived]
    if left_out:
        raise StorageError(
            f"{repo} did not take {', '.join(left_out)}: its .gitignore names them; change it and "
            "push again"
        )


def _checked(repo: str, message: str | None) -> str:
    """Check the name, the message and the token, without files or network; return the token."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HUB_ID.fullmatch(repo):
        raise ConfigError(f"REPO must be owner/name, got {repo!r} (for example ada/phi3-orders)")
    if message is not None and not message.strip():
        raise ConfigError("--message is empty: give it a text, or leave it out")
    if HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, and push needs the hub: unset it and push again")
    token = hub_token()
    if token is None:
        raise ConfigError(
            f"no token: make one with write access at {_TOKENS} and set HF_TOKEN, or run "
            "hf auth login"
        )
    return token


def _names_on(api: Any, repo: str, revision: str | None) -> set[str]:
    """List the files on a branch; create it from main if it is missing."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return set(api.list_repo_files(repo, revision=revision))
    except RevisionNotFoundError:
        if revision is None or revision.startswith("refs/"):
            raise
        api.create_branch(repo, branch=revision, exist_ok=True)
        return set(api.list_repo_files(repo, revision=revision))


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn an error of huggingface_hub into one line with the next step."""
    try:
        yield
    except Phi3LoraError:
        raise
    # ValueError and RuntimeError: a refused model card, and a fault in the upload of a large file.
    except network_errors(ValueError, RuntimeError) as cause:
        raise StorageError(f"cannot push to {repo}: {_reason(cause)}") from None


def _reason(cause: BaseException) -> str:
    status = http_status(cause)
    if status in _REASONS:
        return f"{_REASONS[status]} (HTTP {status})"
    if status is not None and status >= 500:
        return f"the hub has an internal fault (HTTP {status}): push again later"
    said = " ".join(str(cause.__cause__ or cause).split())[:300] or type(cause).__name__
    if status is not None or isinstance(cause, ValueError):
        return f"the hub refuses it: {said}"
    return f"the hub is out of reach: {said}; check the connection (and HF_ENDPOINT), push again"
