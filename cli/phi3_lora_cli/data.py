"""The commands phi3-lora data check, preview and split; data_clean.py holds clean."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console

import phi3_lora
from phi3_lora.report.preview_terminal import print_preview
from phi3_lora_cli.data_clean import clean
from phi3_lora_cli.data_output import print_report, print_split
from phi3_lora_cli.options import data_options, given, note, output_options, print_json

_near_option = click.option(
    "--near-duplicates/--no-near-duplicates",
    default=None,
    help="Look for rows that are nearly alike. Default: yes.",
)


@click.group()
def command() -> None:
    """Check, preview, split or clean data before training on it.

    \b
    Example:
      phi3-lora data check demo --model demo
    """


@command.command()
@data_options
@click.option("--valid", metavar="DATA", help="Rows to validate on; checked too, and for leaks.")
@click.option(
    "--model", metavar="ID|DIR|demo", help="Base model, for lengths in tokens and the loss."
)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@_near_option
@click.option("--min-chars", type=click.IntRange(min=0), help="Fewest characters of a row.")
@click.option("--max-chars", type=click.IntRange(min=0), help="Most characters of a row.")
@click.option(
    "--pattern", "patterns", metavar="REGEX", multiple=True, help="No row may match; repeatable."
)
@click.option("--language", metavar="CODE", help="The language rows should be in, such as en.")
@output_options
def check(data: str | None, as_json: bool, **options: Any) -> int:
    """Report problems in data, with file and line. Nothing is changed.

    DATA, --config and --set mean what they mean for train; the validation rows of a folder are
    checked with it. Exit code 0 if there is no problem, 3 if there is.

    \b
    Example:
      phi3-lora data check chats.jsonl --valid held-out.jsonl --model demo
    """
    report = phi3_lora.check_data(data, note=note, **given(options))
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report)
    return 3 if report.problems else 0


@command.command()
@data_options
@click.option(
    "--model", metavar="ID|DIR|demo", help="Base model, for its tokens and chat template."
)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--limit", type=click.IntRange(min=1), default=5, help="Rows to show. Default: 5.")
@click.option("--html", metavar="FILE", help="Write a page instead of printing.")
@output_options
def preview(data: str | None, as_json: bool, **options: Any) -> None:
    """Show the tokens of the first rows and where the loss counts.

    DATA, --config and --set mean what they mean for train. Green is in the loss, magenta is a
    special token; without colours what is in the loss stands in brackets. Spaces, tabs and line
    ends are made visible.

    \b
    Example:
      phi3-lora data preview demo --model demo --limit 2
    """
    result = phi3_lora.preview_data(data, note=note, **given(options))
    if as_json:
        print_json(result.to_dict())
    elif result.html is not None:
        click.echo(f"wrote {result.html}")
    else:
        documents = [row.document for row in result.rows]
        print_preview(documents, result.tokenizer, Console(highlight=False), result.remarks)


@command.command()
@data_options
@click.option("--output", required=True, metavar="DIR", help="A new folder.")
@click.option(
    "--valid-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    help="Share of the rows to validate on. Default: 0.1.",
)
@click.option("--group-by", metavar="KEY", help="Rows with one value of KEY stay together.")
@click.option("--stratify-by", metavar="KEY", help="Each value of KEY gets the same share.")
@_near_option
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the draw. Default: 0.")
@output_options
def split(data: str | None, output: str, as_json: bool, **options: Any) -> None:
    """Write train.jsonl and valid.jsonl, with no row on both sides.

    Rows that repeat each other, exactly or nearly, stay on one side. Lines of JSONL are written
    as they are, other formats as JSON. The same rows and seed give the same split everywhere.

    \b
    Example:
      phi3-lora data split demo --output runs/split --valid-fraction 0.05
    """
    result = phi3_lora.split_data(data, output=output, note=note, **given(options))
    if as_json:
        print_json(result.to_dict())
    else:
        print_split(result)


command.add_command(clean)
