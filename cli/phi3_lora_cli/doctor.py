"""The command phi3-lora doctor."""

from __future__ import annotations

import click

import phi3_lora
from phi3_lora_cli.options import output_options, print_json


@click.command()
@output_options
def command(as_json: bool) -> None:
    """Show versions, devices, backends and caches, and how to install what is missing.

    \b
    Example:
      phi3-lora doctor
    """
    facts = phi3_lora.doctor().to_dict()
    if as_json:
        print_json(facts)
        return
    click.echo(f"phi3-lora {facts['phi3_lora']}, Python {facts['python']}, {facts['platform']}")
    click.echo(f"{facts['num_cpus']} CPUs; hub cache {facts['hub_cache']}")
    for name, backend in facts["backends"].items():
        if not backend["available"]:
            click.echo(f"backend {name}: cannot run here: {backend['reason']}")
            continue
        versions = ", ".join(f"{k} {v}" for k, v in backend["versions"].items())
        devices = ", ".join(backend["devices"])
        blas = f", BLAS {backend['blas']}" if "blas" in backend else ""
        click.echo(
            f"backend {name}: {versions}; devices: {devices}; "
            f"{backend['num_threads']} threads{blas}"
        )
    for problem in facts["problems"]:
        click.echo(f"problem: {problem}")
    if not facts["problems"]:
        click.echo("no problems found")
