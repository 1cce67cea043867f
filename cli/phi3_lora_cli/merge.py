"""phi3-lora merge."""

from __future__ import annotations

import math
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
    from phi3_lora.export.merge import merge, merge_to_gguf
    from phi3_lora.hub.download import resolve_adapter_dir
    from phi3_lora.inference.base_model import find_base_model
    from phi3_lora.inference.loading import check_base_model, other_base_notes, with_adapter

    _check_types(to, dtype, outtype, dequantize=dequantize)
    if not all(map(math.isfinite, weights)):
        raise click.UsageError(f"--weight must be a number, got {', '.join(map(str, weights))}")
    if weights and len(weights) != len(adapters):
        raise click.UsageError(
            f"{len(adapters)} --adapter and {len(weights)} --weight: give each adapter one, or none"
        )
    folders = [str(resolve_adapter_dir(adapter)) for adapter in adapters]
    base = find_base_model(model, revision, with_weights=to != "adapter")
    if dequantize and base.config.quantization is None:
        raise click.UsageError(f"--dequantize has no effect: {model} is not quantised")
    check_apart(Path(output).expanduser(), base.path, *map(Path, folders))
    parts = []
    for path, weight in zip(folders, weights or [1.0] * len(folders), strict=True):
        base, part = with_adapter(base, path)
        assert part is not None
        parts.append(Weighted(part, weight))
    if to == "adapter":
        _write_sum(parts, Path(output).expanduser(), as_json=as_json)
        return
    checked = check_base_model(base)
    for text in {t for part in parts for t in other_base_notes(part.adapter, checked.identity)}:
        note(text)
    tensors = dict(checked.files.tensors)
    inputs = (base.path, base.config, tensors, parts, Path(output).expanduser())
    if to == "gguf":
        chosen = None if outtype == "auto" else outtype
        result = merge_to_gguf(*inputs, out_type=chosen, dequantized=dequantize)
    else:
        stored = None if dtype == "auto" else dtype
        result = merge(*inputs, dtype=stored, dequantized=dequantize)
    _tell(result, as_json=as_json)


def _write_sum(parts: Any, target: Path, *, as_json: bool) -> None:
    """Write one adapter for several."""
    from phi3_lora.adapters.adapter import adapter_problems
    from phi3_lora.adapters.deltas import concatenated
    from phi3_lora.adapters.formats.folder import check_unused, write_adapter_folder
    from phi3_lora.errors import AdapterError, listing

    check_unused(target)
    adapter = concatenated(parts)
    problems = adapter_problems(adapter)
    if problems:
        raise AdapterError(listing("the sum cannot be written; choose another --weight:", problems))
    for text in write_adapter_folder(target, adapter):
        note(text)
    ranks = sorted({adapter.rank(module) for module in adapter.modules})
    if as_json:
        print_json({"path": str(target), "modules": len(adapter.modules), "ranks": ranks})
        return
    click.echo(
        f"{len(parts)} adapters as one of rank {', '.join(map(str, ranks))}, "
        f"{len(adapter.modules)} modules, in {target}"
    )


def _check_types(to: str, dtype: str, outtype: str, *, dequantize: bool) -> None:
    if to == "adapter" and (dtype != "auto" or outtype != "auto" or dequantize):
        raise click.UsageError("--dtype, --outtype and --dequantize are of models: leave them out")
    if to == "gguf" and dtype != "auto":
        raise click.UsageError("--dtype is of model folders: with --to gguf use --outtype")
    if to != "gguf" and outtype != "auto":
        raise click.UsageError(f"--outtype is of GGUF files: with --to {to} use --dtype")


def _tell(result: Any, *, as_json: bool) -> None:
    from phi3_lora.export.gguf_model import OUT_TYPES

    for text in result.notes:
        note(text)
    worst = result.worst_module
    if worst is None:
        note("nothing is changed: every delta, times its --weight, is 0")
    elif result.survival[worst].cosine < 0.95:
        exact = "--outtype f32" if result.dtype in OUT_TYPES else "--dtype float32"
        note(
            f"{result.dtype} holds only part of the adapter (cosine "
            f"{result.survival[worst].cosine:.3f} in {worst}): merge with {exact}, or keep "
            "base and adapter apart"
        )
    if as_json:
        print_json(
            {
                "path": result.path,
                "dtype": result.dtype,
                "notes": result.notes,
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
