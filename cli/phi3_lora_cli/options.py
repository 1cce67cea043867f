"""Options that several commands share, and functions that print results."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from phi3_lora.api.options import OptionError
from phi3_lora.models.config import QUANTIZATIONS

F = TypeVar("F", bound=Callable[..., Any])


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def output_options(function: F) -> F:
    """Add --json and --debug, and show an OptionError as wrong usage."""

    @functools.wraps(function)
    def command(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except OptionError as problem:
            raise click.UsageError(str(problem)) from None

    return _stack(
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
        click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks."),
    )(cast(F, command))


def backend_options(function: F) -> F:
    """Add --backend, --device, --dtype and --quantize."""
    return _stack(
        click.option("--backend", metavar="[mlx|cuda|auto]", help="Default: auto."),
        click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), help="Default: auto."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="Dtype of the base model. Default: auto (float32 on a CPU, its own on a GPU).",
        ),
        quantize_option,
    )(function)


def quantize_option(function: F) -> F:
    """Add --quantize."""
    return click.option(
        "--quantize",
        type=click.Choice(QUANTIZATIONS),
        help="Quantise the base; 4bit and 8bit are equal on both backends. Default: none.",
    )(function)


def on_bad_row_option(function: F) -> F:
    """Add --on-bad-row."""
    return click.option(
        "--on-bad-row",
        type=click.Choice(["error", "skip"]),
        help="At a row that cannot be used: stop, or leave it out and name it. Default: error.",
    )(function)


def model_options(function: F) -> F:
    """Add --model, --revision and --adapter."""
    return _stack(
        click.option("--model", required=True, metavar="ID|DIR|demo", help="The base model."),
        click.option("--revision", help="Branch, tag or commit of a hub id."),
        click.option("--adapter", metavar="DIR", help="An adapter of PEFT or mlx-lm."),
    )(function)


def data_options(function: F) -> F:
    """Add DATA, -c and --set."""
    return _stack(
        click.argument("data", metavar="DATA", required=False),
        click.option("-c", "--config", type=click.Path(path_type=Path), help="As for train."),
        click.option("--set", multiple=True, metavar="DATA.KEY=VALUE", help="As for train."),
    )(function)


def source_options(function: F) -> F:
    """Add --alpha, --prefix, --enable and --parts, for values that some formats do not store."""
    return _stack(
        click.option("--alpha", type=float, help="lora_alpha of a .pt or .npz, which stores none."),
        click.option(
            "--prefix", default="", help="Text before the module paths of a loralib file."
        ),
        click.option(
            "--enable", metavar="q,v", help="Parts that a MergedLinear of loralib adapts."
        ),
        click.option(
            "--parts",
            type=click.Choice(["equal", "model"]),
            help="How MergedLinear cuts its output, where the file does not say.",
        ),
    )(function)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with a value; the functions have defaults for the others."""
    return {name: value for name, value in options.items() if value is not None}


def print_json(result: dict[str, Any]) -> None:
    """Print one JSON object on stdout, with null for NaN and infinity."""
    click.echo(json.dumps(_finite(result), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def note(text: str) -> None:
    """Print a note on stderr, since stdout holds only the result."""
    click.echo(f"note: {text}", err=True)
