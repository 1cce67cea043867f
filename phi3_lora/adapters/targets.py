"""Resolution of a LoRA configuration to layers of a model; a name without a match is an error."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from phi3_lora.adapters.formats.fused import fused_module, part_slices
from phi3_lora.adapters.formats.peft import by_pattern
from phi3_lora.adapters.names import EMBEDDING, HEAD, ends_with, split_layer
from phi3_lora.config.adapter import LoraConfig
from phi3_lora.engine.lora_spec import Block, LoraLayer, LoraSpec, lora_scaling
from phi3_lora.errors import AdapterError, ConfigError
from phi3_lora.models.config import ModelConfig

Names = str | Sequence[str]


class Resolved(NamedTuple):
    """The layers and weights that a configuration selects in a model."""

    spec: LoraSpec
    notes: list[str]


def resolve(config: LoraConfig, model: ModelConfig) -> Resolved:
    """Find the layers to adapt and the weights to train.

    Raises:
        ConfigError: when a name matches nothing, or a module that it matches cannot be trained.
    """
    notes: list[str] = []
    chosen = _without_parts_of_wholes(_targets(config, model), notes)
    _check_tied(model, chosen)
    layers: dict[str, LoraLayer] = {}
    for module in model.adaptable_shapes():
        rows = {part: r for part, r in part_slices(module, model).items() if part in chosen}
        if module in chosen or rows:
            layers[module] = _layer(config, module, rows)
    saved = _saved(config, model, layers)
    _check_patterns(config, chosen)
    if config.use_dora and EMBEDDING in layers:
        raise ConfigError(
            "use_dora on embed_tokens means other maths in PEFT than in mlx-lm: leave one of the "
            "two out, or train the embedding whole with modules_to_save"
        )
    if config.bias != "none":
        notes.append(f"peft_config.bias {config.bias!r} trains nothing: Phi-3 has no bias")
    spec = LoraSpec(
        layers=layers,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        dropout=config.lora_dropout,
        saved=saved,
    )
    return Resolved(spec, notes)


def in_model_order(spec: LoraSpec, model: ModelConfig) -> LoraSpec:
    """Sort the modules of a spec into the order of the model.

    The order changes the rounding of sums over all tensors, such as a gradient's norm.
    """
    names = [name.removesuffix(".weight") for name in model.tensor_shapes()]
    layers = {m: spec.layers[m] for m in model.adaptable_shapes() if m in spec.layers}
    saved = tuple(name for name in names if name in spec.saved)
    return dataclasses.replace(spec, layers=layers, saved=saved)


def _targets(config: LoraConfig, model: ModelConfig) -> list[str]:
    """Return full paths of the modules to adapt; parts of fused projections have their own."""
    whole = [EMBEDDING, *model.linear_shapes(), HEAD]
    parts = [part for module in whole for part in part_slices(module, model)]
    wanted = _layers_to_transform(config, model)
    inside = {m for m in [*whole, *parts] if (p := split_layer(m)) is not None and p[0] in wanted}
    only_some = config.layers_to_transform is not None
    available = [m for m in [*whole, *parts] if m in inside or (not only_some and m in whole)]
    chosen = match_names(
        "target_modules",
        config.target_modules,
        available,
        all_linear=[m for m in model.linear_shapes() if m in available],
    )
    if not config.exclude_modules:
        return chosen
    own_parts = [part for module in chosen for part in part_slices(module, model)]
    excluded = set(match_names("exclude_modules", config.exclude_modules, [*chosen, *own_parts]))
    left = []
    for module in chosen:
        parts = list(part_slices(module, model))
        kept = [part for part in parts if part not in excluded]
        if module not in excluded:
            # If one part of a fused weight is excluded, its other parts stay.
            left += [module] if kept == parts else kept
    if not left:
        raise ConfigError("exclude_modules leaves nothing of target_modules to adapt")
    return left


def _layers_to_transform(config: LoraConfig, model: ModelConfig) -> set[int]:
    count = model.num_hidden_layers
    given = config.layers_to_transform
    if given is None:
        return set(range(count))
    outside = [number for number in given if not 0 <= number < count]
    if outside or not given:
        raise ConfigError(
            f"layers_to_transform: {outside or given} names no layer; this model has 0 to "
            f"{count - 1}"
        )
    return set(given)


def match_names(
    option: str,
    names: Names,
    available: Sequence[str],
    *,
    all_linear: Sequence[str] = (),
    matches: Callable[[str, str], bool] = ends_with,
) -> list[str]:
    """Return the full paths that names match, in the order of available.

    PEFT's rules hold: a list matches whole paths or their endings, a single string is a regular
    expression over the whole path, all-linear is every linear layer except the head. Here a bare
    string also matches like a list of one name.

    Raises:
        ConfigError: when a name matches nothing; the message lists what exists.
    """
    given = [names] if isinstance(names, str) else list(names)
    chosen: set[str] = set()
    unmatched = []
    for name in given:
        if name == "all-linear" and all_linear:
            chosen |= set(all_linear)
            continue
        found = {m for m in available if matches(m, name)}
        if not found and isinstance(names, str):
            found = set(filter(_full_match(option, name), available))
        chosen |= found
        if not found:
            unmatched.append(name)
    if unmatched:
        raise ConfigError(
            f"{option}: {', '.join(map(repr, unmatched))} matches no layer of this model; there "
            f"are: {_endings(available)}" + (", or use all-linear" if all_linear else "")
        )
    return [m for m in available if m in chosen]


def _full_match(option: str, pattern: str) -> Callable[[str], object]:
    try:
        return re.compile(pattern).fullmatch
    except re.error as cause:
        raise ConfigError(
            f"{option} {pattern!r} is neither a module name nor a regular expression: {cause}"
        ) from None


def _endings(available: Iterable[str]) -> str:
    return ", ".join(sorted({m.rsplit(".", 1)[-1] for m in available}))


def _without_parts_of_wholes(chosen: list[str], notes: list[str]) -> list[str]:
    """Remove the parts whose fused module is adapted as a whole."""
    covered = [m for m in chosen if (whole := fused_module(m)) is not None and whole in chosen]
    if covered:
        notes.append(
            f"target_modules: {_endings(covered)} are parts of a fused projection that is adapted "
            "as a whole"
        )
    return [module for module in chosen if module not in covered]


def _layer(config: LoraConfig, module: str, rows: Mapping[str, slice]) -> LoraLayer:
    """Build the layer of a whole module, or of the parts in rows with their ranks side by side."""
    names = list(rows) or [module]
    try:
        ranks = [int(by_pattern(config.rank_pattern, name, config.r)) for name in names]
        alphas = [by_pattern(config.alpha_pattern, name, config.lora_alpha) for name in names]
    except AdapterError as cause:
        raise ConfigError(f"peft_config: {cause}") from None
    scalings = [
        lora_scaling(alpha, r, use_rslora=config.use_rslora)
        for alpha, r in zip(alphas, ranks, strict=True)
    ]
    if max(scalings) - min(scalings) > 1e-12 * max(scalings):
        raise ConfigError(
            f"rank_pattern and alpha_pattern give {_endings(names)}, parts of one "
            f"fused projection, the scales {', '.join(f'{s:g}' for s in scalings)}: choose alphas "
            "that make them equal"
        )
    ends = list(itertools.accumulate(ranks))
    blocks = tuple(
        Block(part, (rows[part].start, rows[part].stop), (end - r, end))
        for part, r, end in zip(names, ranks, ends, strict=True)
        if rows
    )
    decomposed = config.init_lora_weights is not True and module != EMBEDDING
    r = sum(ranks) * (2 if decomposed else 1)
    grown = r / ranks[0]
    return LoraLayer(
        r=r,
        lora_alpha=alphas[0] * (grown**0.5 if config.use_rslora else grown),
        num_trained=sum(ranks) if decomposed else None,
        blocks=blocks,
    )


def _check_patterns(config: LoraConfig, chosen: Sequence[str]) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        pattern: Mapping[str, float] = getattr(config, option)
        for key in pattern:
            if not any(by_pattern({key: 1.0}, module, 0.0) for module in chosen):
                raise ConfigError(
                    f"{option}: {key!r} matches no adapted layer; there are: {_endings(chosen)}"
                )


def _saved(
    config: LoraConfig, model: ModelConfig, layers: Mapping[str, LoraLayer]
) -> tuple[str, ...]:
    if not config.modules_to_save:
        return ()
    available = [name.removesuffix(".weight") for name in model.tensor_shapes()]
    # PEFT compares any ending of the path here, so norm matches every norm.
    saved = match_names(
        "modules_to_save",
        config.modules_to_save,
        available,
        matches=lambda m, name: m.endswith(name),
    )
    _check_tied(model, saved)
    both = [module for module in saved if module in layers]
    if both:
        raise ConfigError(
            f"modules_to_save: {_endings(both)} is in target_modules too: train it whole or with "
            "LoRA, not both"
        )
    quantised = set(model.grid_shapes()) if model.grid_bits is not None else set()
    if quantised & set(saved):
        raise ConfigError(
            f"modules_to_save: {_endings(quantised & set(saved))} is quantised in this base model "
            "and cannot be trained whole: use target_modules"
        )
    return tuple(saved)


def _check_tied(model: ModelConfig, modules: Iterable[str]) -> None:
    if not model.tie_word_embeddings:
        return
    tied = sorted({EMBEDDING, HEAD} & set(modules))
    if tied:
        raise ConfigError(
            f"{', '.join(tied)}: this model's head is its embedding, and tools differ in whether "
            "an adapter of one holds for the other: leave it out"
        )
