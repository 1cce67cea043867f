"""phi3-lora merge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phi3_lora_cli.options import note, output_options, print_json

if TYPE_CHECKING:
    from phi3_lora.export.merge import MergedAdapter, MergedModel, MergeOptions


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
    type=click.Choice(["hf", "mlx", "gguf", "adapter"]),
    default="hf",
    help="hf, mlx: one folder for both. gguf: one file for llama.cpp, with a Modelfile for Ollama. "
    "adapter: no base, the adapters' sum as one adapter.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Of the result. Default: auto (the base's own).",
)
@click.option(
    "--outtype",
    type=click.Choice(["auto", "f32", "f16", "bf16", "q8_0"]),
    default="auto",
    help="Of a GGUF file. Default: auto (the base's own).",
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
    outtype: str,
    dequantize: bool,
    as_json: bool,
) -> None:
    """Fold adapters into the base model, and say how much of them the result holds.

    With --to adapter several adapters become one, whose ranks stand side by side, exactly.

    \b
    Example:
      phi3-lora merge --model demo --adapter runs/demo/adapter --output runs/merged
    """
    from phi3_lora.adapters.deltas import Weighted
    from phi3_lora.adapters.formats.folder import check_apart
    from phi3_lora.export.merge import MergedAdapter, MergeRequest, merge
    from phi3_lora.hub.download import resolve_adapter_dir
    from phi3_lora.inference.base_model import look_at_model
    from phi3_lora.inference.loading import load_adapter, other_base_notes
    from phi3_lora.models.weights import check_weights, model_identity

    options = _options(to, dtype, outtype, dequantize=dequantize)
    if not all(map(math.isfinite, weights)):
        raise click.UsageError(f"--weight must be a number, got {', '.join(map(str, weights))}")
    if weights and len(weights) != len(adapters):
        raise click.UsageError(
            f"{len(adapters)} --adapter and {len(weights)} --weight: give each adapter one, or none"
        )
    folders = [str(resolve_adapter_dir(adapter)) for adapter in adapters]
    base = look_at_model(model, revision, with_weights=to != "adapter")
    if dequantize and base.config.quantization is None:
        raise click.UsageError(f"--dequantize has no effect: {model} is not quantised")
    target = Path(output).expanduser()
    check_apart(target, base.path, *map(Path, folders))
    parts = [
        Weighted(load_adapter(path, base), weight)
        for path, weight in zip(folders, weights or [1.0] * len(folders), strict=True)
    ]
    tensors = {} if to == "adapter" else check_weights(base.path, base.config)
    if tensors:
        identity = model_identity(base.path, tensors)
        for text in {text for part in parts for text in other_base_notes(part.adapter, identity)}:
            note(text)
    result = merge(
        MergeRequest(
            source=base.path,
            config=base.config,
            tensors=tensors,
            parts=parts,
            target=target,
            options=options,
        )
    )
    for text in result.notes:
        note(text)
    if isinstance(result, MergedAdapter):
        _tell_sum(result, len(parts), as_json=as_json)
    else:
        _tell(result, as_json=as_json)


def _options(to: Any, dtype: str, outtype: str, *, dequantize: bool) -> MergeOptions:
    from phi3_lora.errors import ConfigError
    from phi3_lora.export.merge import MergeOptions

    try:
        return MergeOptions(
            to=to,
            dtype=None if dtype == "auto" else dtype,
            out_type=None if outtype == "auto" else outtype,
            dequantize=dequantize,
        )
    except ConfigError as cause:
        raise click.UsageError(str(cause)) from None


def _tell_sum(result: MergedAdapter, num_adapters: int, *, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
        return
    click.echo(
        f"{num_adapters} adapters as one of rank {', '.join(map(str, result.ranks))}, "
        f"{result.num_modules} modules, in {result.path}"
    )


def _tell(result: MergedModel, *, as_json: bool) -> None:
    worst = result.worst_module
    if worst is None:
        note("nothing is changed: every delta, times its --weight, is 0")
    elif result.survival[worst].cosine < 0.95:
        note(
            f"{result.dtype} holds only part of the adapter (cosine "
            f"{result.survival[worst].cosine:.3f} in {worst}): merge with {result.exact_option}, "
            "or keep base and adapter apart"
        )
    if as_json:
        print_json(result.to_dict())
        return
    click.echo(f"merged {len(result.survival)} modules in {result.dtype} into {result.path}")
    if worst is not None:
        kept = result.survival[worst]
        click.echo(f"of the adapter's direction kept (cosine): {result.mean_cosine:.6f} on average")
        click.echo(f"least: {kept.cosine:.6f}, {kept.norm_ratio:.4f} of its size, in {worst}")
