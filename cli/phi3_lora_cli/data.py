"""phi3-lora data: check, preview and split; clean has a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phi3_lora_cli.data_clean import clean
from phi3_lora_cli.data_output import (
    print_report,
    say_split,
)
from phi3_lora_cli.data_settings import (
    NO_MODEL,
    base_of,
    data_options,
    say_not_taken,
    say_still_needed,
    settings,
)
from phi3_lora_cli.options import note, output_options, print_json

_near_option = click.option(
    "--near-duplicates/--no-near-duplicates",
    "near",
    default=None,
    help="Whether to look for rows that are nearly alike. Default: yes.",
)


@click.group()
def command() -> None:
    """Look at data before training on it: problems, tokens in the loss, a split.

    \b
    Example:
      phi3-lora data check demo --model demo
    """


@command.command()
@data_options
@click.option("--valid", metavar="DATA", help="To validate on; checked too, and for leaks.")
@click.option("--model", metavar="ID|DIR|demo", help="Lengths in tokens, and what is in the loss.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@_near_option
@click.option("--min-chars", type=click.IntRange(min=0), help="Least characters of a row.")
@click.option("--max-chars", type=click.IntRange(min=0), help="Most characters of a row.")
@click.option(
    "--pattern", "patterns", metavar="REGEX", multiple=True, help="No row may match; repeatable."
)
@click.option("--language", metavar="CODE", help="The language rows should be in, such as en.")
@output_options
def check(
    data: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    valid: str | None,
    model: str | None,
    revision: str | None,
    near: bool | None,
    min_chars: int | None,
    max_chars: int | None,
    patterns: tuple[str, ...],
    language: str | None,
    as_json: bool,
) -> int:
    """Report what is wrong in data, with file and line. Nothing is changed.

    DATA, --config and --set mean what they mean for train; the validation rows of a folder are
    checked with it. Exit code 0 if there is no problem, 3 if there is.

    \b
    Example:
      phi3-lora data check chats.jsonl --valid held-out.jsonl --model demo
    """
    from phi3_lora.data.quality.checks import check_rows
    from phi3_lora.data.quality.cleaning import Cleaning
    from phi3_lora.data.sources.reading import check_any, iterate_rows

    limits = Cleaning(
        min_chars=min_chars, max_chars=max_chars, patterns=patterns, language=language
    )
    config, files = settings(
        config_file, assignments, data_train=data, data_valid=valid, model=model, revision=revision
    )
    base = None if config.model == NO_MODEL else base_of(config)
    look_for_near = _look_for_near(near)
    told: list[str] = []
    train = list(iterate_rows(files.train, told))
    check_any(train, files.train)
    held_out = list(iterate_rows(files.valid, told))
    if files.valid:
        check_any(held_out, files.valid)
    for text in told:
        note(text)
    report = check_rows(train, held_out, base=base, near=look_for_near, limits=limits)
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report)
    return 3 if report.problems else 0


def _look_for_near(near: bool | None) -> bool:
    """What was asked for; if nothing was, what is possible, and a word on it."""
    from phi3_lora.data.quality.duplicates import can_find_near

    if near is None and not can_find_near():
        note("near duplicates are not looked for: pip install 'phi3-lora[data]'")
        return False
    return near is not False


@command.command()
@data_options
@click.option("--model", metavar="ID|DIR|demo", help="Whose tokens and chat template.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--limit", type=click.IntRange(min=1), default=5, help="Rows shown. Default: 5.")
@click.option("--html", "page", metavar="FILE", help="Write a page in place of printing.")
@output_options
def preview(
    data: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    model: str | None,
    revision: str | None,
    limit: int,
    page: str | None,
    as_json: bool,
) -> None:
    """Show the tokens of the first rows and where the loss counts.

    DATA, --config and --set mean what they mean for train. Green is in the loss, magenta is a
    special token; without colours what is in the loss stands in brackets. Spaces, tabs and line
    ends are made visible.

    \b
    Example:
      phi3-lora data preview demo --model demo --limit 2
    """
    from phi3_lora.data.quality.checks import as_trained, first_rows
    from phi3_lora.errors import ConfigError
    from phi3_lora.report.preview import preview_rows, print_preview, write_preview

    config, files = settings(
        config_file, assignments, data_train=data, model=model, revision=revision
    )
    if config.model == NO_MODEL:
        raise ConfigError("no model: pass --model, or model in --config FILE")
    base = base_of(config)
    rows = as_trained(first_rows(files.train, limit), base)
    result: dict[str, Any] = {"documents": [row.to_dict() for row in preview_rows(rows)]}
    shown = [row.document for row in rows]
    remarks = [f"{row.training} in training: {row.remark}" if row.remark else "" for row in rows]
    if page is not None:
        path = _page_path(page)
        title = f"{files.train[0]}, as {config.model} sees it"
        write_preview(path, shown, base.tokenizer, title, remarks)
        result["html"] = str(path)
    if as_json:
        print_json(result)
    elif page is not None:
        click.echo(f"wrote {result['html']}")
    else:
        from rich.console import Console

        print_preview(shown, base.tokenizer, Console(highlight=False), remarks)


def _page_path(page: str) -> Path:
    path = Path(page).expanduser()
    if not path.name or path.is_dir():
        raise click.UsageError(f"--html must name a file, got {page!r}")
    return path


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
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the draw. Default: 0.")
@output_options
def split(
    data: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    output: str,
    valid_fraction: float,
    group_by: str | None,
    stratify_by: str | None,
    near: bool | None,
    seed: int,
    as_json: bool,
) -> None:
    """Write train.jsonl and valid.jsonl, with nothing on both sides.

    Rows that repeat each other, exactly or nearly, stay on one side. Lines of JSONL are written
    as they are, other formats as JSON. The same rows and seed give the same split everywhere.

    \b
    Example:
      phi3-lora data split demo --output runs/split --valid-fraction 0.05
    """
    from phi3_lora.data.quality.splitting import (
        check_unused,
        read_split_rows,
        split_rows,
        write_split,
    )

    folder = Path(output).expanduser()
    check_unused(folder)
    config, files = settings(config_file, assignments, data_train=data)
    say_not_taken(files)
    notes: list[str] = []
    rows = read_split_rows(
        files.train,
        keys=[key for key in (group_by, stratify_by) if key],
        near=near is not False,
        on_bad_row=config.data.on_bad_row,
        notes=notes,
    )
    for text in notes:
        note(text)
    # A split that is not free of leaks must be asked for.
    found = split_rows(
        rows,
        fraction=valid_fraction,
        seed=seed,
        group_by=group_by,
        stratify_by=stratify_by,
        near=near is not False,
    )
    write_split(rows, found, folder)
    say_still_needed(files)
    say_split(found, folder, valid_fraction, as_json=as_json)


command.add_command(clean)
