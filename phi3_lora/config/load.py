"""Settings from their sources: built-in < preset < config file < --set < flags."""

from __future__ import annotations

import dataclasses
import difflib
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
from phi3_lora.config.values import coerce, entry_kind, type_name
from phi3_lora.errors import ConfigError, listing

_SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "training_config": TrainingConfig,
    "peft_config": LoraConfig,
}


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The resolved settings of a run, with notes on them."""

    config: RunConfig
    notes: list[str] = field(default_factory=list)
    """Texts on settings that have no effect here."""


def load_settings(
    *,
    preset: str | None = None,
    config_file: Path | Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> RunSettings:
    """Merge the sources of a run's settings and check every name and value.

    Args:
        preset: a name in PRESETS.
        config_file: the path of a YAML file, or a mapping with its keys.
        base: a resolved configuration, which every other source overrides.
        assignments: `section.key=value` or `key=value`; the value is YAML.
        flags: dotted name -> value; None values are left out.

    Raises:
        ConfigError: with every bad value and every unknown name (and the nearest known one).
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
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: when the file is missing, is not YAML, or does not hold a mapping.
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
        ConfigError: with every bad value and every unknown name (and the nearest known one).
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
    """Return the values that have a field here; note or refuse the other known names."""
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
    """Return the values by field name, each in the type of its field."""
    # The dataclass checks the values of a Literal; its message lists them.
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
        kind_of_entry = entry_kind(hints[name])
        if kind_of_entry is not None:
            found[name] = _entries(kind_of_entry, label, item, problems)
            continue
        try:
            found[name] = coerce(item, hints[name])
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{label} must be {type_name(hints[name])}, got {item!r}")
    return found


def _entries(kind: type[Any], label: str, value: Any, problems: list[str]) -> tuple[Any, ...]:
    """Return the records of a list; an entry is a mapping, or a string for the first field."""
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
