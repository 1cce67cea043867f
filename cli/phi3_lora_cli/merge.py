"""phi3-lora merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phi3_lora_cli.options import note, output_options, print_json


@click.command()
@click.option("--model", required=True, metavar="ID|DIR|demo", help="The base model.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--adapter",
    "adapters",
    required=True,
    multiple=True,
    metavar="DIR|ID",
    help="An adapter's folder or hub id; several are added up.",
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    type=float,
    help="Of each --adapter, in the same order. Default: 1.",
)
@click.option("--output", required=True, metavar="DIR", help="A new folder.")
@click.option(
    "--to",
    type=click.Choice(["hf", "mlx"]),
    default="hf",
    help="One folder is both: transformers and mlx-lm load it.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Of the result. Default: auto (the base's own).",
)
@click.option("--dequantize", is_flag=True, help="Write a base of 4 or 8 bits in full.")
@output_options
def command(
    model: str,
    revision: str | None,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    output: str,
    to: str,
    dtype: str,
    dequantize: bool,
    as_json: bool,
) -> None:
    """Fold adapters into the base model, and say how much of them the result holds.

    \b
    Example:
      phi3-lora merge --model demo --adapter runs/demo/adapter --output runs/merged
    """
    from phi3_lora.adapters.deltas import Weighted
    from phi3_lora.hub import resolve_adapter_dir
    from phi3_lora.loading import load_adapter, look_at_model, other_base_notes
    from phi3_lora.merge import merge
    from phi3_lora.weights import check_weights, model_identity

    if weights and len(weights) != len(adapters):
        raise click.UsageError(
            f"{len(adapters)} --adapter and {len(weights)} --weight: give each adapter one, or none"
        )
    folders = [str(resolve_adapter_dir(adapter)) for adapter in adapters]
    base = look_at_model(model, revision)
    parts = [
        Weighted(load_adapter(path, base), weight)
        for path, weight in zip(folders, weights or [1.0] * len(folders), strict=True)
    ]
    tensors = check_weights(base.path, base.config)
    identity = model_identity(base.path, tensors)
    for text in {text for part in parts for text in other_base_notes(part.adapter, identity)}:
        note(text)
    result = merge(
        base.path,
        base.config,
        tensors,
        parts,
        Path(output).expanduser(),
        dtype=None if dtype == "auto" else dtype,
        dequantized=dequantize,
    )
    _tell(result, as_json=as_json)


def _tell(result: Any, *, as_json: bool) -> None:
    worst = result.worst_module
    if worst is None:
        note("the adapter changes nothing: every B is 0")
    elif result.survival[worst].cosine < 0.95:
        note(
            f"{result.dtype} holds only part of the adapter (cosine "
            f"{result.survival[worst].cosine:.3f} in {worst}): merge with --dtype float32, or keep "
            "base and adapter apart"
        )
    if as_json:
        print_json(
            {
                "path": result.path,
                "dtype": result.dtype,
                "survival": {
                    module: {"cosine": kept.cosine, "norm_ratio": kept.norm_ratio}
                    for module, kept in result.survival.items()
                },
            }
        )
        return
    click.echo(f"merged {len(result.survival)} modules in {result.dtype} into {result.path}")
    if worst is not None:
        kept = result.survival[worst]
        click.echo(f"of the adapter's direction kept (cosine): {result.mean_cosine:.6f} on average")
        click.echo(f"least: {kept.cosine:.6f}, {kept.norm_ratio:.4f} of its size, in {worst}")
