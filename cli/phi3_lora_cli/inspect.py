"""The command phi3-lora inspect."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.table import Table

import phi3_lora
from phi3_lora_cli.options import given, note, output_options, print_json, source_options


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.option("--plot", metavar="FILE.png|FILE.html", help="Write the norms as a heat map.")
@click.option(
    "--model", metavar="ID|DIR|demo", help="The base model, which a loralib file may need."
)
@source_options
@output_options
def command(adapter: str, as_json: bool, **options: Any) -> None:
    """Show an adapter's layout, rank, effective scale, layers and norms.

    \b
    Example:
      phi3-lora inspect runs/demo/adapter
    """
    facts = phi3_lora.inspect(adapter, **given(options)).to_dict()
    (print_json if as_json else _print)(facts)


def _print(facts: dict[str, Any]) -> None:
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
