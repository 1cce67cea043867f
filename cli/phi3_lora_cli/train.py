"""The command phi3-lora train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import phi3_lora
from phi3_lora.report.console import ConsoleObserver
from phi3_lora_cli.options import (
    backend_options,
    given,
    note,
    on_bad_row_option,
    output_options,
    print_json,
)


@click.command()
@click.option("--model", metavar="ID|DIR|demo", help="The base model.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--data",
    metavar="FILE|DIR|ID|demo",
    help="JSONL, JSON, CSV or Parquet; a folder, a pattern, a data set of the hub.",
)
@click.option("--valid", metavar="FILE|DIR|ID", help="Rows to validate on, named as --data.")
@click.option("--valid-fraction", type=float, help="Share of --data to validate on.")
@on_bad_row_option
@click.option("--output", "output_dir", metavar="RUN", help="The run folder.")
@click.option("--adapter", metavar="DIR", help="Start from this adapter.")
@click.option("-c", "--config", "config_file", type=click.Path(path_type=Path), help="YAML file.")
@click.option("--preset", metavar="NAME", help="demo or sample-finetune.")
@click.option("--set", multiple=True, metavar="SECTION.KEY=VALUE", help="A setting.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of --output.")
@click.option("--dry-run", is_flag=True, help="Show the plan; load no weights, write nothing.")
@backend_options
@click.option("--max-steps", type=int, help="Optimizer steps.")
@click.option("--epochs", type=float, help="Passes over the data. Default: 1.")
@click.option("--batch-size", type=int, help="Documents in a micro-batch. Default: 4.")
@click.option("--grad-accum", type=int, help="Micro-batches in a step. Default: 1.")
@click.option("--lr", type=float, help="Peak learning rate. Default: 2e-4.")
@click.option("--rank", type=int, help="LoRA rank. Default: 16.")
@click.option("--alpha", type=float, help="LoRA alpha. Default: 32.")
@click.option("--dropout", type=float, help="LoRA dropout. Default: 0.")
@click.option(
    "--targets",
    metavar="NAMES",
    help="Comma-separated modules, or one regular expression. Default: all-linear.",
)
@click.option("--max-length", type=int, help="Tokens a document may have. Default: 2048.")
@click.option("--packing/--no-packing", default=None, help="Fill rows of --max-length.")
@click.option("--seed", type=int, help="Seed of every draw. Default: 0.")
@click.option("-v", "--verbose", is_flag=True, help="Also name each saved checkpoint.")
@click.option("-q", "--quiet", is_flag=True, help="Print notes and errors only.")
@output_options
def command(
    config_file: Path | None,
    resume: bool,
    dry_run: bool,
    verbose: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune a Phi-3 model with LoRA.

    \b
    Examples:
      phi3-lora train --model demo --data demo --preset demo --output runs/demo
      phi3-lora train --model microsoft/Phi-3-mini-4k-instruct --data chats.jsonl --output runs/a
      phi3-lora train --resume --output runs/a
    """
    if resume and options["output_dir"] is None:
        raise click.UsageError("--resume needs --output: the run folder to continue")
    settings = phi3_lora.resolve_settings(config_file, resume=resume, **given(options))
    for text in settings.notes:
        note(text)
    config = settings.config
    observer = ConsoleObserver(verbosity=1 if verbose else -1 if quiet else 0)
    if dry_run:
        plan = phi3_lora.dry_run(config, observer=observer).to_dict()
        (print_json if as_json else _print_plan)(plan)
        return
    try:
        result = phi3_lora.train(config, resume=resume, observer=observer)
    finally:
        observer.close()
    if as_json:
        print_json(result.to_dict())
    elif not quiet:
        quantize = "" if config.quantize == "none" else f" --quantize {config.quantize}"
        click.echo(f"adapter: {result.adapter}", err=True)
        click.echo(
            f"try it: phi3-lora generate --model {config.model}{quantize} --adapter "
            f"{result.adapter} --prompt '...'",
            err=True,
        )


def _print_plan(facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name.ljust(width)}  {_figure(value)}")


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_figure(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
