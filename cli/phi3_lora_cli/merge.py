"""The command phi3-lora merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import phi3_lora
from phi3_lora.export.merge import MergedAdapter
from phi3_lora_cli.options import given, note, output_options, print_json

if TYPE_CHECKING:
    from phi3_lora.export.merge import MergedModel


@click.command()
@click.option("--model", required=True, metavar="ID|DIR|demo", help="The base model.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--adapter",
    required=True,
    multiple=True,
    metavar="DIR|ID",
    help="An adapter's folder or hub id; several are added up.",
)
@click.option(
    "--weight",
    multiple=True,
    type=float,
    help="Factor of each --adapter, in the same order. Default: 1.",
)
@click.option("--output", required=True, metavar="DIR", help="A new folder.")
@click.option(
    "--to",
    type=click.Choice(["hf", "mlx", "gguf", "adapter"]),
    default="hf",
    help="hf, mlx: one folder for both. gguf: one file for llama.cpp, with a Modelfile for Ollama. "
    "adapter: the sum of the adapters as one adapter, without the base.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Dtype of the result. Default: auto (the base's own).",
)
@click.option(
    "--outtype",
    type=click.Choice(["auto", "f32", "f16", "bf16", "q8_0"]),
    default="auto",
    help="Type of a GGUF file. Default: auto (the base's own).",
)
@click.option("--dequantize", is_flag=True, help="Write a base of 4 or 8 bits in full.")
@output_options
def command(
    model: str, adapter: tuple[str, ...], output: str, as_json: bool, **options: Any
) -> None:
    """Fold adapters into the base model, and report how much of them the result holds.

    With --to adapter several adapters become one, exactly; its rank is the sum of their ranks.

    \b
    Example:
      phi3-lora merge --model demo --adapter runs/demo/adapter --output runs/merged
    """
    result = phi3_lora.merge(model, adapter, output, note=note, **given(options))
    if as_json:
        print_json(result.to_dict())
    elif isinstance(result, MergedAdapter):
        click.echo(
            f"{len(adapter)} adapters as one of rank {', '.join(map(str, result.ranks))}, "
            f"{result.num_modules} modules, in {result.path}"
        )
    else:
        _print(result)


def _print(merge: MergedModel) -> None:
    click.echo(f"merged {len(merge.survival)} modules in {merge.dtype} into {merge.path}")
    worst = merge.worst_module
    if worst is not None:
        kept = merge.survival[worst]
        click.echo(f"of the adapter's direction kept (cosine): {merge.mean_cosine:.6f} on average")
        click.echo(f"least: {kept.cosine:.6f}, {kept.norm_ratio:.4f} of its size, in {worst}")
