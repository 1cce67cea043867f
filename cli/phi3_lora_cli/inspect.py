"""phi3-lora inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phi3_lora_cli.options import (
    note,
    output_options,
    part_names,
    print_json,
    untold_options,
)


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.option("--plot", metavar="FILE.png|FILE.html", help="Write the norms as a heat map.")
@click.option("--model", metavar="ID|DIR|demo", help="The base: a loralib file may need it.")
@untold_options
@output_options
def command(
    adapter: str,
    plot: str | None,
    model: str | None,
    alpha: float | None,
    prefix: str,
    enable: str | None,
    parts: str | None,
    as_json: bool,
) -> None:
    """Show an adapter's layout, rank, effective scale, layers and norms.

    \b
    Example:
      phi3-lora inspect runs/demo/adapter
    """
    from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
    from phi3_lora.adapters.inspection import inspect_adapter
    from phi3_lora.hub.download import resolve_adapter_dir
    from phi3_lora.inference.base_model import look_at_model
    from phi3_lora.report.heatmap import check_name, write_heat_map

    path = None if plot is None else Path(plot).expanduser()
    if path is not None:
        check_name(path)
    config = None if model is None else look_at_model(model, with_weights=False).config
    untold = MissingMetadata(alpha, prefix, part_names(enable), parts)
    report = inspect_adapter(resolve_adapter_dir(adapter), untold, config)
    facts = report.to_dict()
    if path is not None:
        write_heat_map(path, report.delta_norms, f"Norm of each delta: {adapter}")
        facts["plot"] = str(path)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    layers = facts["layers"]
    click.echo(f"layout      {facts['layout']}")
    click.echo(f"base model  {facts['base_model'] or 'not recorded'}")
    kind = "alpha / sqrt(r), rsLoRA" if facts["use_rslora"] else "alpha / r"
    most = "" if facts["is_uniform"] else " in most modules"
    click.echo(f"rank        {facts['r']}, alpha {facts['lora_alpha']:g}{most}")
    click.echo(f"scale       {facts['effective_scale']:g} ({kind}){most}")
    if facts["use_dora"]:
        click.echo("DoRA        yes: each row of the weights also has a magnitude")
    for module in facts["saved_modules"]:
        click.echo(f"whole       {module}")
    click.echo(f"parameters  {facts['num_parameters']:,}")
    if layers:
        click.echo(f"layers      {len(layers)} ({layers[0]} to {layers[-1]})")
    for tool, answer in facts["loads_in"].items():
        click.echo(f"loads in    {tool}: {answer}")
    title = "Frobenius norm of each delta" + ("" if facts["is_uniform"] else " (rank, scale)")
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    for target in facts["target_modules"]:
        table.add_column(target.rsplit(".", 1)[-1], justify="right")
    for layer in layers:
        modules = [f"model.layers.{layer}.{target}" for target in facts["target_modules"]]
        table.add_row(str(layer), *(_cell(facts, module) for module in modules))
    Console().print(table)
    for module in facts["outside_layers"]:
        click.echo(f"{module}: {_cell(facts, module)}")
    for text in facts["notes"]:
        note(text)
    if facts["no_op_modules"]:
        count = len(facts["no_op_modules"])
        click.echo(
            f"{count} of {len(facts['delta_norms'])} modules change nothing (their delta is 0)"
        )
    if "plot" in facts:
        click.echo(f"heat map    {facts['plot']}")


def _cell(facts: dict[str, Any], module: str) -> str:
    found = facts["modules"].get(module)
    if found is None:
        return "-"
    own = "" if facts["is_uniform"] else f" ({found['r']}, {found['scale']:g})"
    return f"{found['delta_norm']:.4g}{own}"
