"""The command phi3-lora push."""

from __future__ import annotations

import sys
from typing import Any

import click
from huggingface_hub.utils.tqdm import disable_progress_bars

import phi3_lora
from phi3_lora_cli.options import given, note, output_options, print_json


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.argument("repo", metavar="REPO")
@click.option("--private", is_flag=True, help="Make REPO private; refuse one that is public.")
@click.option("--revision", metavar="BRANCH", help="A branch of REPO. Default: main.")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@output_options
def command(adapter: str, repo: str, as_json: bool, **options: Any) -> None:
    """Send an adapter with its model card to the Hugging Face hub, as REPO (owner/name).

    The adapter is checked first, and only its own files are sent, in one commit. The token is that
    of HF_TOKEN or of hf auth login.

    \b
    Example:
      phi3-lora push runs/demo/adapter ada/phi3-orders --private
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    done = phi3_lora.push(adapter, repo, note=note, **given(options))
    if as_json:
        print_json(done.to_dict())
        return
    click.echo(f"pushed {', '.join(done.files)}")
    if done.removed:
        click.echo(f"deleted {', '.join(done.removed)}, which this adapter does not have")
    click.echo(f"at     {done.url}")
    at = f"@{options['revision']}" if options["revision"] else ""
    click.echo(f"use    --adapter {repo}{at}")
