"""The command phi3-lora parity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import phi3_lora
from phi3_lora_cli.options import (
    given,
    model_options,
    note,
    output_options,
    print_json,
    quantize_option,
)

if TYPE_CHECKING:
    from phi3_lora.verification.parity import Law


@click.command()
@model_options
@click.option("--data", metavar="FILE|DIR|demo", help="Documents to use. Default: built-in texts.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Training steps."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto")
@quantize_option
@output_options
def command(model: str, as_json: bool, **options: Any) -> int:
    """Check on your own model that both backends give the same numbers.

    Each backend of this machine runs in float32, one after the other. Exit code 0 if every law
    holds, 3 if one does not. With one backend only, see verify.

    \b
    Example:
      phi3-lora parity --model demo --data demo --steps 5 --device cpu
    """
    result = phi3_lora.parity(model, note=note, **given(options))
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result.laws)
    return 0 if result.holds else 3


def _print(laws: tuple[Law, ...]) -> None:
    width = max(len(law.what) for law in laws)
    click.echo(f"law  {'what'.ljust(width)}       value        gate")
    for law in laws:
        word = "holds" if law.holds else "MISSED"
        click.echo(
            f"{law.law}   {law.what.ljust(width)}  {law.value:>10.2e}  {law.gate:>10.2e}  {word}"
        )
