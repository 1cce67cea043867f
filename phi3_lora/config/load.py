"""Settings from their sources: built-in < preset < config file < --set < flags."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from phi3_lora.config.adapter import LoraConfig
from phi3_lora.config.data import DataConfig
from phi3_lora.config.known import ALIASES, INSTEAD, NO_EFFECT, ONLY, PRESETS
from phi3_lora.config.schema import RunConfig
from phi3_lora.config.training import TrainingConfig
from phi3_lora.errors import ConfigError, listing

_SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "training_config": TrainingConfig,
    "peft_config": LoraConfig,
}


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Resolved settings, and what the user should know about them."""

    config: RunConfig
    notes: list[str] = field(default_factory=list)
    """Known names that have no effect here."""


def load_settings(
    *,
    preset: str | None = None,
    config_file: Path | Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> RunSettings:
    """Merge all sources and check every name and value.

    Args:
        preset: a name in PRESETS.
        config_file: YAML, or the mapping in it.
        base: an already resolved configuration, under everything else.
        assignments: `section.key=value` or `key=value`, the value in YAML.
        flags: dotted name -> value; None values are left out.

    Raises:
        ConfigError: one message with every unknown name (and the nearest one) and bad value.
    """
    layers: list[Mapping[str, Any]] = [base or {}]
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"no preset {preset!r}; there are: {', '.join(sorted(PRESETS))}")
        layers.append(PRESETS[preset])
    if config_file is not None:
        layers.append(config_file if isinstance(config_file, Mapping) else read_yaml(config_file))
    layers += [_nested(*_parse_assignment(text)) for text in assignments]
    layers += [_nested(name, v) for name, v in (flags or {}).items() if v is not None]
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer)
    return resolve(merged)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: when it is missing, is not YAML, or holds no mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such config file: {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise ConfigError(f"{path} is not readable YAML: {cause}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping, got {type(value).__name__}")
    return value


def _parse_assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set takes section.key=value, got {text!r}")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as cause:
        raise ConfigError(f"--set {text}: the value is not YAML: {cause}") from None


def _nested(name: str, value: Any) -> dict[str, Any]:
    section, dot, key = name.partition(".")
    return {section: {key: value}} if dot else {section: value}


def _merge(target: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        if name == "data" and not isinstance(value, Mapping):
            value = {"train": value}
        if name in _SECTIONS and isinstance(value, Mapping):
            section = target.setdefault(name, {})
            if isinstance(section, dict):
                section.update({ALIASES.get(key, key): item for key, item in value.items()})
                continue
        target[name] = value


def resolve(merged: Mapping[str, Any]) -> RunSettings:
    """Check merged settings and build the configuration.

    Raises:
        ConfigError: as load_settings.
    """
    problems: list[str] = []
    notes: list[str] = []
    values: dict[str, Any] = {}
    for name, value in merged.items():
        if name not in _SECTIONS:
            continue
        if not isinstance(value, Mapping):
            problems.append(f"{name} must be a mapping, got {value!r}")
            continue
        known = _known_values(name, value, problems, notes)
        values[name] = _section(_SECTIONS[name], name, known, problems)
    top = {name: value for name, value in merged.items() if name not in _SECTIONS}
    values.update(_checked(RunConfig, "", top, problems))
    if problems:
        raise ConfigError(listing("the configuration cannot be used:", problems))
    return RunSettings(RunConfig(**values), notes)


def _known_values(
    section: str, value: Mapping[str, Any], problems: list[str], notes: list[str]
) -> dict[str, Any]:
    """The values that have a field here; the other known names are noted or refused."""
    kept = {}
    for name, item in value.items():
        if name in NO_EFFECT.get(section, {}):
            notes.append(f"{section}.{name} has no effect: {NO_EFFECT[section][name]}")
        elif name in ONLY.get(section, {}):
            allowed = ONLY[section][name]
            if item not in allowed:
                instead = f" ({INSTEAD[name]})" if name in INSTEAD else ""
                problems.append(
                    f"{section}.{name}: {item!r} is not supported; leave it out{instead}"
                )
        else:
            # YAML 1.1 reads an unquoted no as false.
            is_no = item is False and name in ("eval_strategy", "save_strategy")
            kept[name] = "no" if is_no else item
    return kept


def _section(kind: type[Any], section: str, value: Mapping[str, Any], problems: list[str]) -> Any:
    before = len(problems)
    checked = _checked(kind, section, value, problems)
    if len(problems) > before:
        return None
    try:
        return kind(**checked)
    except ConfigError as cause:
        problems.append(str(cause))
        return None


def _checked(
    kind: type[Any], section: str, value: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    """Values by field name, in the field's type."""
    # A section checks the values of a Literal itself, with a message that lists them.
    hints = {
        name: str if typing.get_origin(hint) is typing.Literal else hint
        for name, hint in typing.get_type_hints(kind).items()
    }
    names = [f.name for f in dataclasses.fields(kind)]
    found = {}
    for name, item in value.items():
        label = f"{section}.{name}" if section else str(name)
        if name not in names:
            problems.append(f"unknown key {label}{_nearest(str(name), section, names)}")
            continue
        kind_of_entry = _entry_kind(hints[name])
        if kind_of_entry is not None:
            found[name] = _entries(kind_of_entry, label, item, problems)
            continue
        try:
            found[name] = _coerce(item, hints[name])
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{label} must be {_type_name(hints[name])}, got {item!r}")
    return found


def _entry_kind(hint: Any) -> type[Any] | None:
    """The class of the entries of a list of records; None for anything else."""
    entries = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
    is_record = (
        bool(entries)
        and isinstance(entries[0], type)
        and hasattr(entries[0], "__dataclass_fields__")
    )
    return entries[0] if is_record else None


def _entries(kind: type[Any], label: str, value: Any, problems: list[str]) -> tuple[Any, ...]:
    """A list of records, each a mapping or its first field alone."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        problems.append(f"{label} must be a list of mappings, got {value!r}")
        return ()
    first = dataclasses.fields(kind)[0].name
    found = []
    for number, item in enumerate(value, start=1):
        entry = {first: item} if isinstance(item, str) else item
        if isinstance(entry, kind):
            entry = dataclasses.asdict(entry)
        if not isinstance(entry, Mapping):
            problems.append(f"{label}, entry {number}: must be a mapping, got {item!r}")
        elif first not in entry:
            problems.append(f"{label}, entry {number}: {first} is missing")
        else:
            found.append(_section(kind, f"{label}[{number}]", entry, problems))
    return tuple(found)


def _nearest(name: str, section: str, names: Sequence[str]) -> str:
    homes = [
        home
        for home, kind in _SECTIONS.items()
        if name in {f.name for f in dataclasses.fields(kind)}
    ]
    if homes:
        return f": it belongs to {homes[0]}"
    own = [*names, *ALIASES, *(() if section else _SECTIONS)]
    others = [*NO_EFFECT.get(section, {}), *ONLY.get(section, {})]
    for candidates in (own, others):
        close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
        if close:
            return f": did you mean {close[0]}?"
    return f"; known: {', '.join(names)}"


def _coerce(value: Any, hint: Any) -> Any:
    """Convert a YAML value to a field's type; YAML 1.1 reads 2e-4 as a string."""
    if typing.get_origin(hint) is typing.Literal:
        # The dataclass itself checks which texts are allowed.
        hint = str
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    holders = {typing.get_origin(option): typing.get_args(option) for option in options}
    if value is None or value in ({}, []):
        return _empty(options, holders)
    if isinstance(value, bool) or options == (bool,):
        if bool in options and isinstance(value, bool):
            return value
        raise TypeError
    if dict in holders and isinstance(value, dict):
        return {str(name): _coerce(item, holders[dict][1]) for name, item in value.items()}
    if tuple in holders and isinstance(value, (list, tuple)):
        return _items(value, holders[tuple][0])
    if holders.get(tuple, (None,))[0] is int:
        return _items([value], int)
    if int in options:
        number = float(value)
        if number != int(number):
            raise ValueError
        return int(number)
    if float in options:
        return float(value)
    if isinstance(value, str) and str in options:
        return value
    raise TypeError


def _empty(options: Sequence[Any], holders: Mapping[Any, Any]) -> Any:
    """Null, or a list or mapping of nothing, which other tools write as null too."""
    if types.NoneType in options:
        return None
    if tuple in holders or dict in holders:
        return () if tuple in holders else {}
    raise TypeError


def _items(values: Sequence[Any], kind: type[Any]) -> tuple[Any, ...]:
    """A list of names or of whole numbers."""
    if any(isinstance(v, bool) or not isinstance(v, kind) for v in values):
        raise TypeError
    return tuple(values)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        hint = str
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    text = str(hint)
    if hint in names:
        return names[hint]
    if "dict" in text:
        kinds = {str: "names", int: "whole numbers", float: "numbers"}
        return f"a mapping from names to {kinds[typing.get_args(hint)[1]]}"
    if "tuple[int" in text:
        return "an integer or a list of integers"
    return "a string or a list of strings" if "tuple" in text else text
