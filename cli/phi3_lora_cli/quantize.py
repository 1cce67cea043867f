"""phi3-lora quantize."""

from __future__ import annotations

from pathlib import Path

import click

from phi3_lora_cli.options import output_options, print_json


@click.command()
@click.option("--model", required=True, metavar="ID|DIR|demo", help="The base model.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--output", required=True, metavar="DIR", help="A new folder.")
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True)
@output_options
def command(model: str, revision: str | None, output: str, bits: str, as_json: bool) -> None:
    """Write a base model in 4 or 8 bits, with equal weights on both backends.

    The folder also loads in stock mlx-lm and, with compressed-tensors installed, in stock
    transformers. Embedding and output head keep their dtype.

    \b
    Example:
      phi3-lora quantize --model demo --output runs/demo-4bit
    """
    from phi3_lora.errors import ModelError
    from phi3_lora.hub.download import resolve_model_dir
    from phi3_lora.models.quantization.folder import write_quantized_folder
    from phi3_lora.models.weights import check_model_files
    from phi3_lora.storage.atomic import check_folder_unused

    target = Path(output).expanduser()
    check_folder_unused(target, ModelError, "already holds something: choose another --output")
    source = check_model_files(resolve_model_dir(model, revision))
    error = write_quantized_folder(
        source.path, source.config, source.tensors, target, bits=int(bits)
    )
    if as_json:
        print_json(
            {
                "path": str(target),
                "bits": int(bits),
                "error": error.mean,
                "worst_error": error.worst,
                "worst_module": error.worst_module,
            }
        )
        return
    click.echo(f"{bits} bits, groups of 32, in {target}")
    click.echo(f"relative error of the weights: {error.mean:.4f}")
    click.echo(f"largest: {error.worst:.4f} in {error.worst_module}")
