"""The command phi3-lora generate."""

from __future__ import annotations

import sys
from typing import Any

import click

import phi3_lora
from phi3_lora_cli.options import (
    backend_options,
    given,
    model_options,
    note,
    output_options,
    print_json,
)


@click.command()
@model_options
@click.option("--prompt", required=True, metavar="TEXT", help="The user's message; - for stdin.")
@click.option("--system", metavar="TEXT", help="A system message before it.")
@backend_options
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=256,
    help="Most tokens of the answer. Default: 256.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, max=100),
    default=0.0,
    help="0 (default) is greedy.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, help="Seed of the draws. Default: 0."
)
@output_options
def command(model: str, prompt: str, as_json: bool, **options: Any) -> None:
    """Answer one prompt; the text is streamed to stdout.

    \b
    Example:
      phi3-lora generate --model demo --prompt "Hello"
    """
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise click.UsageError("--prompt is not UTF-8 text")

    def show(text: str) -> None:
        if not as_json:
            click.echo(text, nl=False)

    answer = phi3_lora.generate(model, prompt, on_text=show, note=note, **given(options))
    if as_json:
        print_json(answer.to_dict())
    else:
        click.echo()
