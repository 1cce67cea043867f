"""Choice of the files of an adapter that go to the hub, checked and without local paths."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.deltas import changes_nothing
from phi3_lora.adapters.fingerprint import FINGERPRINT_NAME, read_fingerprint
from phi3_lora.adapters.formats import mlx_lm as mlx_layout
from phi3_lora.adapters.formats import peft as peft_layout
from phi3_lora.adapters.formats.config_file import CONFIG_NAME, read_adapter_config
from phi3_lora.adapters.formats.detect import find_layouts
from phi3_lora.adapters.formats.folder import TEMPLATE_NAME, read_adapter
from phi3_lora.errors import AdapterError
from phi3_lora.hub.download import HUB_ID, first_line

CARD_NAME = "README.md"
_WEIGHTS = {
    peft_layout.WEIGHTS_NAME: "PEFT",
    mlx_layout.WEIGHTS_NAME: "mlx-lm",
}
OWN_FILES = (CONFIG_NAME, *_WEIGHTS, FINGERPRINT_NAME, TEMPLATE_NAME, CARD_NAME)
"""Every file that push may send, replace or delete."""
_BASE_KEYS = ("base_model_name_or_path", "model")
"""Keys of adapter_config.json under which PEFT and mlx-lm name the base model."""
_CACHED = re.compile(r"models--([\w.]+(?:-[\w.]+)*)--([\w.-]+)/snapshots/")
"""The folder of a hub id in the hub's cache."""
_CARD_PATH = re.compile(r"^(\| (?:Base model|Training data) \| `)([^`\n]+)(`)", re.MULTILINE)
"""Rows of the model card of a training run that may hold a path."""


@dataclass(frozen=True, slots=True)
class Upload:
    """The files to send, by their name on the hub."""

    files: dict[str, Path | bytes]
    """A path where the file is sent unchanged, bytes where it is changed."""
    notes: tuple[str, ...]
    """A text on each change to a file."""


class _Card(NamedTuple):
    """A model card."""

    head: dict[str, Any]
    """The YAML block at its start."""
    body: str
    """The text after the block."""

    def text(self) -> str:
        # huggingface_hub's CardData drops keys whose value is null.
        head = yaml.safe_dump(self.head, sort_keys=False, allow_unicode=True)
        return f"---\n{head}---\n{self.body}"


def files_to_push(folder: Path, repo: str) -> Upload:
    """Read and check an adapter folder, and choose the files to send.

    The base model is named only by a hub id. A path in the hub's cache becomes the id. Any other
    local path becomes null in adapter_config.json and is left out of the card's head: its last
    part alone could be read as the id of another model.

    Args:
        folder: the adapter's folder, which is not changed.
        repo: owner/name, for the title of a new card.

    Raises:
        AdapterError: when the adapter is damaged, its files have other names, or the hub cannot
            read the head of README.md.
    """
    layouts = find_layouts(folder)
    adapter = read_adapter(folder, keep_parts=True)
    others = sorted(path.name for path in layouts.values() if path.name not in _WEIGHTS)
    if others:
        raise AdapterError(
            f"{folder} has its weights in {', '.join(others)}; the hub gets {' or '.join(_WEIGHTS)}"
            f": phi3-lora convert {folder} NEW --to both, then push NEW"
        )
    files: dict[str, Path | bytes] = {path.name: path for path in layouts.values()}
    config, notes = _without_local_paths(read_adapter_config(folder))
    files[CONFIG_NAME] = (
        (json.dumps(config, indent=2) + "\n").encode() if notes else folder / CONFIG_NAME
    )
    if changes_nothing(adapter):
        notes.append("this adapter changes nothing: every delta is 0")
    if (folder / FINGERPRINT_NAME).exists():
        read_fingerprint(folder)
        files[FINGERPRINT_NAME] = folder / FINGERPRINT_NAME
    if (folder / TEMPLATE_NAME).exists():
        files[TEMPLATE_NAME] = folder / TEMPLATE_NAME
    base = next((config[key] for key in _BASE_KEYS if _is_hub_id(config.get(key))), None)
    if (folder / CARD_NAME).exists():
        text, card_notes = _checked_card(folder / CARD_NAME, base, adapter.base_model)
        files[CARD_NAME] = text.encode() if card_notes else folder / CARD_NAME
        notes += card_notes
    else:
        files[CARD_NAME] = _new_card(repo, base, adapter, files).encode()
        notes.append(f"no {CARD_NAME} in {folder}: a short model card is made")
    return Upload({name: files[name] for name in OWN_FILES if name in files}, tuple(notes))


def _is_hub_id(value: Any) -> bool:
    return isinstance(value, str) and bool(HUB_ID.fullmatch(value)) and not _is_local(value)


def _is_local(value: str) -> bool:
    """Return whether a model's name is a path and not a hub id or an address."""
    if "://" in value:
        return False
    if value.startswith(("/", "~", ".")) or "\\" in value or re.match(r"[A-Za-z]:", value):
        return True
    return value.count("/") > 1 or ("/" in value and Path(value).exists())


def _without_local_paths(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration without local paths, and a note on each change."""
    notes = []
    cleaned = dict(config)
    for key in _BASE_KEYS:
        value = config.get(key)
        if not isinstance(value, str) or not _is_local(value):
            continue
        cached = _CACHED.search(value)
        cleaned[key] = f"{cached[1]}/{cached[2]}" if cached else None
        notes.append(f"{CONFIG_NAME}: {key} is a local path, sent as {json.dumps(cleaned[key])}")
    for key, value in config.items():
        if key not in _BASE_KEYS and (found := _path_in(value)) is not None:
            cleaned[key] = None
            notes.append(f"{CONFIG_NAME}: {key} holds the local path {found}, sent as null")
    return cleaned, notes


def _path_in(value: Any) -> str | None:
    """Find an absolute path in a value of the configuration, at any depth."""
    if isinstance(value, str):
        return value if re.match(r"(/|~/|[A-Za-z]:[\\/])", value) else None
    if isinstance(value, dict):
        value = list(value.values())
    parts = map(_path_in, value) if isinstance(value, list) else ()
    return next((part for part in parts if part is not None), None)


def _checked_card(path: Path, base: str | None, trained_on: str | None) -> tuple[str, list[str]]:
    """Return the text of a card with a complete head, and a note on each change."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise AdapterError(f"{path} is not UTF-8 text: save it as UTF-8, or delete it") from None
    card = _split_card(path, text)
    head, notes = _mended_head(card.head, base)
    shorter = _CARD_PATH.sub(
        lambda row: row[1] + (Path(row[2]).name if _is_local(row[2]) else row[2]) + row[3],
        card.body,
    )
    if trained_on is not None and _is_local(trained_on):
        shorter = shorter.replace(trained_on, Path(trained_on).name)
    if shorter != card.body:
        notes.append(f"{CARD_NAME}: local paths are sent as their last part")
    return (_Card(head, shorter).text() if notes else text), notes


def _split_card(path: Path, text: str) -> _Card:
    """Split a model card into its head and the text after it.

    Raises:
        AdapterError: when the hub cannot read the head.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    match = REGEX_YAML_BLOCK.match(text)
    step = "mend it, or delete the file and a card is made"
    if match is None:
        if text.lstrip().startswith("---"):
            raise AdapterError(f"{path} begins with --- but its head has no end line ---: {step}")
        return _Card({}, text)
    try:
        head = yaml.safe_load(match[2])
    except yaml.YAMLError as cause:
        raise AdapterError(f"the head of {path} is not YAML: {first_line(cause)}; {step}") from None
    head = {} if head is None else head
    if not isinstance(head, dict):
        raise AdapterError(
            f"the head of {path} must be names with values, got {type(head).__name__}: {step}"
        )
    for name in ("base_model", "tags"):
        value = head.get(name) or []
        if not all(isinstance(v, str) for v in (value if isinstance(value, list) else [value])):
            raise AdapterError(f"the head of {path}: {name} must be texts, got {value!r}: {step}")
    return _Card(head, text[match.end() :])


def _mended_head(head: Mapping[str, Any], base: str | None) -> tuple[dict[str, Any], list[str]]:
    """Return the head as the hub needs it, and a note on each change."""
    notes = []
    mended = dict(head)
    if "library_name" not in head:
        mended["library_name"] = "peft"
        notes.append(f"{CARD_NAME}: library_name: peft is added to its head")
    named = head.get("base_model") or []
    named = named if isinstance(named, list) else [named]
    kept = [name for name in named if _is_hub_id(name)]
    if kept != named:
        wrong = next(name for name in named if name not in kept)
        notes.append(f"{CARD_NAME}: base_model {wrong!r} is not a hub id and is left out")
    if not kept and base is not None:
        kept = [base]
        notes.append(f"{CARD_NAME}: base_model: {base} is added to its head")
    if kept:
        mended["base_model"] = kept[0] if len(kept) == 1 else kept
    else:
        mended.pop("base_model", None)
    tags = head.get("tags") or []
    tags = tags if isinstance(tags, list) else [tags]
    # PEFT writes base_model:adapter:/local/path.
    public = [t for t in tags if not t.startswith("base_model:") or _is_hub_id(t.split(":")[-1])]
    if public != tags:
        mended["tags"] = public
        notes.append(f"{CARD_NAME}: a tag that names a local base model is left out")
    return mended, notes


def _new_card(repo: str, base: str | None, adapter: Adapter, files: Mapping[str, Any]) -> str:
    """Build a short model card for an adapter without one."""
    head: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "phi-3"]}
    if base is not None:
        head["base_model"] = base
    readers = [f"`{name}` loads in {tool}" for name, tool in _WEIGHTS.items() if name in files]
    targets = ", ".join(f"`{t}`" for t in sorted({m.rsplit(".", 1)[-1] for m in adapter.modules}))
    body = (
        f"\n# {repo.split('/')[1]}\n\nA LoRA adapter of {f'`{base}`' if base else 'a Phi-3 model'}."
        f"\n\n| | |\n|---|---|\n| Rank, alpha | {adapter.r}, {adapter.lora_alpha:g} |\n"
        f"| Modules | {targets} |\n\n{', '.join(readers)}. With phi3-lora:\n\n```\n"
        f'phi3-lora generate --model {base or "BASE"} --adapter {repo} --prompt "Hello"\n```\n'
    )
    return _Card(head, body).text()
