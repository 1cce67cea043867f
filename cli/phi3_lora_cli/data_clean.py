"""The command phi3-lora data clean."""

from __future__ import annotations

from typing import Any

import click

import phi3_lora
from phi3_lora_cli.options import data_options, given, note, output_options, print_json


@click.command()
@data_options
@click.option("--output", required=True, metavar="DIR", help="A new folder.")
@click.option(
    "--unicode", is_flag=True, help="Put text into Unicode NFC; take out control characters."
)
@click.option(
    "--white-space", is_flag=True, help="Make spaces plain; take them off the ends of turns."
)
@click.option("--empty", is_flag=True, help="Drop rows with an empty user turn.")
@click.option("--duplicates", is_flag=True, help="Keep the first of equal rows.")
@click.option("--near-duplicates", is_flag=True, help="Keep the first of nearly equal rows.")
@click.option("--min-chars", type=click.IntRange(min=0), help="Fewest characters of a row.")
@click.option("--max-chars", type=click.IntRange(min=0), help="Most characters of a row.")
@click.option(
    "--min-tokens", type=click.IntRange(min=0), help="Fewest tokens of a row; needs --model."
)
@click.option(
    "--max-tokens", type=click.IntRange(min=0), help="Most tokens of a row; needs --model."
)
@click.option(
    "--pattern",
    "patterns",
    metavar="REGEX",
    multiple=True,
    help="Drop rows that match; repeatable.",
)
@click.option("--language", metavar="CODE", help="Drop rows in another language, such as en.")
@click.option(
    "--model", metavar="ID|DIR|demo", help="Base model, for its tokens and chat template."
)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@output_options
def clean(data: str | None, output: str, as_json: bool, **options: Any) -> None:
    """Write the rows to train on, cleaned, and every change that was made.

    Every step is optional. DIR/train.jsonl holds what is left, as messages or text and with the
    other keys of each row, DIR/changes.jsonl each changed or dropped row before and after; the
    data itself is not touched.

    \b
    Example:
      phi3-lora data clean chats.jsonl --output cleaned --white-space --duplicates
    """
    result = phi3_lora.clean_data(data, output=output, note=note, **given(options))
    if as_json:
        print_json(result.to_dict())
        return
    for step, count in result.steps.items():
        click.echo(f"{step.ljust(16)} changed {count['changed']:,}, dropped {count['dropped']:,}")
    click.echo(f"kept {result.kept:,} of {result.rows:,} rows in {result.path}")
