"""phi3-lora doctor."""

from __future__ import annotations

import click

from phi3_lora_cli.options import output_options, print_json


@click.command()
@output_options
def command(as_json: bool) -> None:
    """Show versions, devices, backends and caches, and the line that mends what is missing.

    \b
    Example:
      phi3-lora doctor
    """
    from phi3_lora.report.doctor import examine

    report = examine()
    if as_json:
        print_json(report.to_dict())
        return
    click.echo(f"phi3-lora {report.phi3_lora}, Python {report.python}, {report.platform}")
    click.echo(f"{report.num_cpus} CPUs; hub cache {report.hub_cache}")
    for name, found in report.backends.items():
        if not found.is_available:
            click.echo(f"backend {name}: cannot run here: {found.reason}")
            continue
        backend = found.facts
        versions = ", ".join(f"{k} {v}" for k, v in backend["versions"].items())
        devices = ", ".join(backend["devices"])
        blas = f", BLAS {backend['blas']}" if "blas" in backend else ""
        click.echo(
            f"backend {name}: {versions}; devices: {devices}; "
            f"{backend['num_threads']} threads{blas}"
        )
    for problem in report.problems:
        click.echo(f"problem: {problem}")
    if not report.problems:
        click.echo("no problems found")
