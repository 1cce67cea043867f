"""The command phi3-lora convert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import phi3_lora
from phi3_lora.adapters.formats.registry import TARGETS
from phi3_lora.adapters.formats.tools import CONSUMERS
from phi3_lora_cli.options import given, note, output_options, print_json, source_options

if TYPE_CHECKING:
    from phi3_lora.api.adapters import ConversionResult


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--to", type=click.Choice(list(TARGETS)), help="The layout; --for implies one.")
@click.option(
    "--for", "for_tool", type=click.Choice(list(CONSUMERS)), help="Write what this tool reads."
)
@click.option("--model", metavar="ID|DIR|demo", help="The base model.")
@click.option(
    "--verify", is_flag=True, help="Compare the result with SRC; exit code 3 if it differs."
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Largest rank of the result; higher ranks are cut, with loss.",
)
@source_options
@output_options
def command(source: str, target: str, as_json: bool, **options: Any) -> int:
    """Move an adapter between layouts: PEFT, mlx-lm, unfused q, k, v (Unsloth), loralib, GGUF.

    SRC's layout is found by its content. The result is read back and compared. The layout unfused
    needs --model for the sizes of q, k and v; so does an unfused SRC that leaves one of them out.
    With --verify and --model, the model's answers with both are compared too.

    \b
    Example:
      phi3-lora convert mlx_adapter peft_adapter --to peft --verify
    """
    result = phi3_lora.convert(source, target, note=note, **given(options))
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result, target)
    return 0 if result.equal else 3


def _print(result: ConversionResult, target: str) -> None:
    done, found = result.conversion, result.comparison
    exact = "exactly" if done.lossless else f"to {done.max_weight_difference:.2e}"
    click.echo(f"{done.source} -> {done.to}: {done.tensors} tensors, {exact}, in {target}")
    if found is None:
        return
    click.echo(
        f"largest difference of a delta, relative: {found.max_relative_difference:.2e}"
        + (f" ({found.worst_module})" if found.max_relative_difference else "")
    )
    for answer in found.answers or ():
        click.echo(
            f"logits, {answer.reader}: {answer.max_difference:.2e} of their standard deviation"
        )
    click.echo("verified: the same adapter" if found.is_equal else "NOT the same adapter")
