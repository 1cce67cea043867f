"""The command phi3-lora verify."""

from __future__ import annotations

from typing import Any

import click

import phi3_lora
from phi3_lora_cli.options import backend_options, given, note, output_options, print_json


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.option("--model", required=True, metavar="ID|DIR|demo", help="The base model.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@backend_options
@output_options
def command(adapter: str, model: str, as_json: bool, **options: Any) -> int:
    """Compare an adapter's behaviour here with its behaviour where it was trained.

    Its fingerprint is replayed: the log-probabilities of fixed texts. Exit code 0 if they agree, 3
    if one differs by more than the threshold (0.001 nats in float32, 0.05 in half precision).

    \b
    Example:
      phi3-lora verify runs/demo/adapter --model demo --backend mlx
    """
    result = phi3_lora.verify(adapter, model, note=note, **given(options))
    if as_json:
        print_json(result.to_dict())
    else:
        verdict, origin = result.verdict, result.origin
        click.echo(f"trained on        {origin.get('backend')}, {origin.get('dtype')}")
        click.echo(f"max difference    {verdict.max_difference:.3g} nats")
        click.echo(f"mean difference   {verdict.mean_difference:.3g} nats")
        click.echo(f"greedy agreement  {verdict.greedy_agreement:.2%}")
        click.echo(f"base model alone  {verdict.base_max_difference:.3g} nats")
        word = "equal" if verdict.equal else "different"
        click.echo(f"{word}: the threshold is {verdict.threshold:g} nats")
    return 0 if result.equal else 3
