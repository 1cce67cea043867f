"""loralib's format: a .pt file of lora_A and lora_B by module path, without alpha or config.

Source: microsoft/LoRA, loralib/layers.py (Linear, Embedding, MergedLinear) and utils.py
(lora_state_dict).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from phi3_lora.adapters.adapter import Adapter, uniform_adapter, with_scalings
from phi3_lora.adapters.formats.archive import entry_names
from phi3_lora.adapters.formats.fused import FUSED_PARTS, part_rows
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.record import FileFormat, Written
from phi3_lora.adapters.formats.torch_pickle import encode_torch_file, read_torch_file
from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.arrays import Float32, Tensors
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models.config import ModelConfig
from phi3_lora.storage.atomic import replace_file

_NAME = re.compile(r"^(.+)\.(lora_[AB])$")
_MODULE = re.compile(r"(?:^|\.)(model\.layers\.\d+\..+|model\.embed_tokens|lm_head)$")


def from_loralib(
    tensors: Mapping[str, Float32],
    missing: MissingMetadata,
    where: str,
    config: ModelConfig | None = None,
) -> Adapter:
    """Convert a state dict to an adapter; tensors that are not LoRA are ignored.

    Args:
        tensors: the state dict.
        missing: values that the file does not store.
        where: the file, for messages.
        config: configuration of the base model, for the sizes of a MergedLinear's parts.

    Raises:
        AdapterError: when alpha is missing, a pair is incomplete, or Phi-3 has no such module.
    """
    if missing.alpha is None:
        raise AdapterError(
            f"{where}: loralib stores no alpha; pass --alpha to phi3-lora convert, as the "
            "layers used it"
        )
    pairs: dict[str, dict[str, Float32]] = {}
    for name, value in tensors.items():
        match = _NAME.match(name)
        if match is not None:
            pairs.setdefault(match[1], {})[match[2]] = value
    problems, found, scalings = [], {}, {}
    for path, pair in pairs.items():
        try:
            a, b = _factors(path, pair, missing, config)
            module = _module(path, missing.prefix)
            found[module] = a, b
            scalings[module] = missing.alpha / pair["lora_B"].shape[1]
        except AdapterError as cause:
            problems.append(str(cause))
    if problems or not found:
        problems = problems or ["no lora_A and lora_B in it"]
        raise AdapterError(listing(f"{where} cannot be used:", problems))
    return with_scalings(found, scalings)


def _module(path: str, prefix: str) -> str:
    match = _MODULE.search(path.removeprefix(prefix))
    if match is None:
        raise AdapterError(
            f"{path}: not a module path of Phi-3 (model.layers.N...); pass --prefix if it starts "
            "with a name of your own"
        )
    return match[1]


def _factors(
    path: str, pair: Mapping[str, Float32], missing: MissingMetadata, config: ModelConfig | None
) -> tuple[Float32, Float32]:
    """Return A (ranks, in) and B (out, ranks) of a Linear or MergedLinear layer."""
    if set(pair) != {"lora_A", "lora_B"}:
        raise AdapterError(f"{path}: {' and '.join(pair)} without its pair")
    a, b = pair["lora_A"], pair["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] < 1 or len(a) % b.shape[1]:
        raise AdapterError(f"{path}: A {a.shape} and B {b.shape} do not belong together")
    count, r = len(a) // b.shape[1], b.shape[1]
    fused = next((name for name in FUSED_PARTS if path.endswith(name)), None)
    if fused is None:
        if count > 1:
            raise AdapterError(f"{path}: {count} parts, but it is not a fused projection")
        return a, b
    parts = [part.split(".")[1].removesuffix("_proj") for part in FUSED_PARTS[fused]]
    whole = sum(_own_rows(parts, config).values())
    chosen = [part for part in parts if part in missing.enable] or parts
    if count == 1 and (len(b) == whole or (not whole and len(chosen) != 1)):
        return a, b
    if len(chosen) != count:
        raise AdapterError(
            f"{path}: {count} of {', '.join(parts)} are adapted; pass --enable with their names"
        )
    own = _own_rows(parts, config) if missing.parts != "equal" else {}
    rows = _part_rows(path, len(b), parts, chosen, own, layout=missing.parts)
    wide = np.zeros((sum(rows.values()), len(a)), np.float32)
    start = used = column = 0
    for part in parts:
        if part in chosen:
            block = b[used : used + rows[part]]
            wide[start : start + rows[part], column : column + r] = block
            used, column = used + rows[part], column + r
        start += rows[part]
    return a, wide


def _own_rows(parts: Sequence[str], config: ModelConfig | None) -> dict[str, int]:
    """Return rows of each part in the model; an empty dict if the model is not known."""
    if config is None:
        return {}
    rows = {n.split(".")[1].removesuffix("_proj"): count for n, count in part_rows(config).items()}
    return {part: rows[part] for part in parts}


def _part_rows(
    path: str,
    given: int,
    parts: Sequence[str],
    chosen: Sequence[str],
    own: Mapping[str, int],
    *,
    layout: str | None,
) -> dict[str, int]:
    """Return rows of each part: equal, as loralib splits every MergedLinear, or the model's."""
    fits_own = bool(own) and sum(own[part] for part in chosen) == given
    equal = given // len(chosen)
    fits_equal = given % len(chosen) == 0 and (not own or equal * len(parts) == sum(own.values()))
    if fits_own and fits_equal and len(set(own.values())) > 1 and layout is None:
        raise AdapterError(
            f"{path}: all of {', '.join(parts)} are adapted, and equal parts, as loralib "
            "splits them, cannot be distinguished from the model's: pass --parts equal or --parts "
            "model"
        )
    if fits_own and layout != "equal":
        return dict(own)
    if fits_equal and layout != "model":
        return dict.fromkeys(parts, equal)
    raise AdapterError(
        f"{path}: B has {given} rows for {', '.join(chosen)}, which are neither equal parts nor "
        f"those of the model ({dict(own) or 'pass --model'})"
    )


def to_loralib(adapter: Adapter, prefix: str = "") -> Tensors:
    """Return lora_state_dict of a model with loralib's Linear and Embedding layers.

    Args:
        adapter: an adapter with one rank and one scale (uniform_adapter).
        prefix: text before each name.

    Raises:
        AdapterError: when loralib cannot hold the adapter.
    """
    reason = why_not_loralib(adapter)
    if reason is not None:
        raise AdapterError(f"{reason}: merge the adapter, or convert it to peft")
    tensors = {}
    for module in adapter.modules:
        tensors[f"{prefix}{module}.lora_A"] = adapter.weights[lora_a_name(module)]
        tensors[f"{prefix}{module}.lora_B"] = adapter.weights[lora_b_name(module)]
    return tensors


def why_not_loralib(adapter: Adapter) -> str | None:
    """Return the reason why loralib cannot hold an adapter, or None."""
    if adapter.use_dora:
        return "loralib has no DoRA"
    return "loralib has no whole weights" if adapter.saved else None


def _is_torch_archive(path: Path) -> bool:
    return any(name.endswith("/data.pkl") for name in entry_names(path))


def _read(path: Path, missing: MissingMetadata, config: ModelConfig | None) -> Adapter:
    return from_loralib(read_torch_file(path), missing, str(path), config)


def _write(path: Path, adapter: Adapter, missing: MissingMetadata) -> Written:
    # loralib has one alpha for all layers of one rank.
    adapter = uniform_adapter(adapter)
    replace_file(path, encode_torch_file(to_loralib(adapter, missing.prefix)))
    alpha = adapter.scaling * adapter.r
    note = f"loralib stores neither rank nor alpha: r is {adapter.r}, lora_alpha {alpha:.9g}"
    return Written(notes=[note], missing=MissingMetadata(alpha, missing.prefix))


LORALIB = FileFormat(
    name="loralib",
    pattern="*.pt",
    detect=_is_torch_archive,
    read=_read,
    write=_write,
    refusal=why_not_loralib,
    read_options=frozenset({"alpha", "prefix", "enable", "parts"}),
    write_options=frozenset({"prefix"}),
)
