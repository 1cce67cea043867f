"""The command phi3-lora quantize."""

from __future__ import annotations

from typing import Literal

import click

import phi3_lora
from phi3_lora_cli.options import output_options, print_json


@click.command()
@click.option("--model", required=True, metavar="ID|DIR|demo", help="The base model.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--output", required=True, metavar="DIR", help="A new folder.")
@click.option(
    "--bits",
    type=click.Choice(["4", "8"]),
    default="4",
    show_default=True,
    help="Bits of a weight.",
)
@output_options
def command(model: str, revision: str | None, output: str, bits: str, as_json: bool) -> None:
    """Write a base model in 4 or 8 bits, with equal weights on both backends.

    The folder also loads in stock mlx-lm and, with compressed-tensors installed, in stock
    transformers. Embedding and output head keep their dtype.

    \b
    Example:
      phi3-lora quantize --model demo --output runs/demo-4bit
    """
    size: Literal[4, 8] = 4 if bits == "4" else 8
    result = phi3_lora.quantize(model, output, bits=size, revision=revision)
    if as_json:
        print_json(result.to_dict())
        return
    click.echo(f"{result.bits} bits, groups of 32, in {result.path}")
    click.echo(f"relative error of the weights: {result.error:.4f}")
    click.echo(f"largest: {result.worst_error:.4f} in {result.worst_module}")
