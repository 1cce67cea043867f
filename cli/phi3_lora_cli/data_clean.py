"""phi3-lora data clean."""

from __future__ import annotations

from pathlib import Path

import click

from phi3_lora_cli.data_settings import NO_MODEL, base_of, data_options, say_not_taken, settings
from phi3_lora_cli.options import note, output_options, print_json


@click.command()
@data_options
@click.option("--output", required=True, metavar="DIR", help="A new folder.")
@click.option("--unicode", is_flag=True, help="Unicode NFC; control characters taken out.")
@click.option("--white-space", is_flag=True, help="Ends of turns, odd and invisible spaces.")
@click.option("--empty", is_flag=True, help="Drop rows with an empty user turn.")
@click.option("--duplicates", is_flag=True, help="Keep the first of equal rows.")
@click.option("--near-duplicates", is_flag=True, help="Keep the first of nearly equal rows.")
@click.option("--min-chars", type=click.IntRange(min=0), help="Least characters of a row.")
@click.option("--max-chars", type=click.IntRange(min=0), help="Most characters of a row.")
@click.option("--min-tokens", type=click.IntRange(min=0), help="Least tokens; with --model.")
@click.option("--max-tokens", type=click.IntRange(min=0), help="Most tokens; with --model.")
@click.option(
    "--pattern", "patterns", metavar="REGEX", multiple=True, help="Drop what matches; repeatable."
)
@click.option("--language", metavar="CODE", help="Drop rows in another language than this.")
@click.option("--model", metavar="ID|DIR|demo", help="Whose tokens and chat template.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@output_options
def clean(
    data: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    output: str,
    model: str | None,
    revision: str | None,
    as_json: bool,
    **steps: object,
) -> None:
    """Write the rows to train on, cleaned, and what was done to which row.

    Every step is optional. DIR/train.jsonl holds what is left, as messages or text and with the
    other keys of each row, DIR/changes.jsonl each changed or dropped row before and after; the
    data itself is not touched.

    \b
    Example:
      phi3-lora data clean chats.jsonl --output cleaned --white-space --duplicates
    """
    from phi3_lora.data.quality.cleaned_files import read_for_cleaning, write_cleaned
    from phi3_lora.data.quality.cleaning import Cleaning
    from phi3_lora.data.quality.cleaning import clean as clean_rows
    from phi3_lora.data.quality.splitting import check_unused

    chosen = Cleaning(**steps)  # type: ignore[arg-type]
    if chosen == Cleaning():
        raise click.UsageError("no step is chosen: name at least one, for example --white-space")
    folder = Path(output).expanduser()
    check_unused(folder)
    config, files = settings(
        config_file, assignments, data_train=data, model=model, revision=revision
    )
    has_token_limit = (chosen.min_tokens, chosen.max_tokens) != (None, None)
    if has_token_limit and config.model == NO_MODEL:
        raise click.UsageError(
            "--min-tokens and --max-tokens need --model, whose tokens they count"
        )
    say_not_taken(files)
    notes: list[str] = []
    rows, others = read_for_cleaning(files.train, on_bad_row=config.data.on_bad_row, notes=notes)
    for text in notes:
        note(text)
    tokenizer = None if config.model == NO_MODEL else base_of(config).tokenizer
    found = clean_rows(rows, chosen, tokenizer)
    names = write_cleaned(folder, found, others)
    counts, total = found.counts(), len(rows)
    if not found.rows:
        note("no row is left: training needs at least one")
    if as_json:
        result = {"path": str(folder), "files": names, "rows": total, "kept": len(found.rows)}
        print_json({**result, "steps": counts})
        return
    for step, count in counts.items():
        click.echo(f"{step.ljust(16)} changed {count['changed']:,}, dropped {count['dropped']:,}")
    click.echo(f"kept {len(found.rows):,} of {total:,} rows in {folder}")
