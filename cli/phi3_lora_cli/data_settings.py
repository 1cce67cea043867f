"""What the data commands share: where the data is, and what train would make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from phi3_lora_cli.options import note

if TYPE_CHECKING:
    from phi3_lora.config.schema import RunConfig
    from phi3_lora.data.documents.dataset import DataFiles
    from phi3_lora.data.quality.checks import TokenBudget

F = TypeVar("F", bound=Callable[..., Any])

NO_MODEL = "(no model)"
"""In place of the model, which a run needs and a look at data does not."""


def data_options(function: F) -> F:
    """DATA, -c and --set."""
    found: Callable[..., Any] = function
    for decorate in (
        click.option(
            "--set", "assignments", multiple=True, metavar="DATA.KEY=VALUE", help="As for train."
        ),
        click.option(
            "-c", "--config", "config_file", type=click.Path(path_type=Path), help="As for train."
        ),
        click.argument("data", metavar="DATA", required=False),
    ):
        found = decorate(found)
    return cast(F, found)


def settings(
    config_file: Path | None, assignments: tuple[str, ...], **flags: str | None
) -> tuple[RunConfig, DataFiles]:
    """What train would make of the same settings: the configuration and the sources."""
    from phi3_lora.config.load import load_settings
    from phi3_lora.data.documents.dataset import resolve_data
    from phi3_lora.errors import ConfigError

    if flags["data_train"] is None and config_file is None and not assignments:
        raise ConfigError("no data: name DATA, or a --config FILE that names it")
    named = {name.replace("data_", "data."): value for name, value in flags.items()}
    config = load_settings(
        base={"model": NO_MODEL, "output_dir": "unused"},
        config_file=config_file,
        assignments=assignments,
        flags=named,
    ).config
    data = config.data
    return config, resolve_data(data.source or "", data.valid, more=data.more)


def base_of(config: RunConfig) -> TokenBudget:
    """The base model's tokenizer and context, with the settings' own template and loss."""
    from phi3_lora.data.documents.encoding import Encoding
    from phi3_lora.data.quality.checks import TokenBudget
    from phi3_lora.inference.base_model import look_at_model

    data = config.data
    model = look_at_model(
        config.model, config.revision, with_weights=False, chat_template=data.chat_template
    )
    for text in model.tokenizer.notes:
        note(text)
    encoding = Encoding(
        max_length=config.training_config.max_length,
        context=model.config.max_position_embeddings,
        loss_on=data.loss_on,
        too_long=data.too_long,
    )
    return TokenBudget(model.tokenizer, encoding)


def say_not_taken(files: DataFiles) -> None:
    """Say what a command that writes the rows to train on, each once, leaves aside."""
    if files.valid:
        names = ", ".join(map(str, files.valid))
        note(f"only the rows to train on are taken: the validation rows in {names} are left out")
    weighed = [f"{source} {source.weight:g}" for source in files.train if source.weight != 1]
    if weighed:
        note(
            f"each row is taken once: weights of sources ({', '.join(weighed)}) are for training; "
            "to keep them write each source on its own"
        )


def say_still_needed(files: DataFiles) -> None:
    """Say which settings rows that are written as they are need again."""
    first = files.train[0]
    needed = [] if first.format == "auto" else [f"data.format={first.format}"]
    if first.columns:
        columns = ", ".join(f"{ours}: {theirs}" for ours, theirs in first.columns.items())
        needed.append(f"data.columns={{{columns}}}")
    if needed:
        note(f"rows are written as they are: to read them set {' and '.join(needed)} again")
