"""phi3-lora convert."""

from __future__ import annotations

from pathlib import Path

import click

from phi3_lora_cli.options import note, output_options, print_json


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option(
    "--to", type=click.Choice(["peft", "mlx", "both", "unfused", "loralib"]), required=True
)
@click.option("--model", metavar="ID|DIR|demo", help="The base model: makes the config shorter.")
@click.option("--alpha", type=float, help="lora_alpha of a loralib SRC: the file stores none.")
@click.option("--prefix", default="", help="Before the module paths of a loralib file.")
@click.option(
    "--enable", metavar="q,v", help="The parts that MergedLinear of a loralib SRC adapts."
)
@output_options
def command(
    source: str,
    target: str,
    to: str,
    model: str | None,
    alpha: float | None,
    prefix: str,
    enable: str | None,
    as_json: bool,
) -> None:
    """Move an adapter between layouts: PEFT, mlx-lm, unfused q, k, v (Unsloth), loralib.

    SRC's layout is told by its content. The result is read back and compared. unfused needs --model
    for the sizes of q, k and v; so does an unfused SRC that leaves one of them out.

    \b
    Example:
      phi3-lora convert mlx_adapter peft_adapter --to peft
    """
    from phi3_lora.adapters.convert import convert
    from phi3_lora.adapters.loralib_layout import Untold
    from phi3_lora.hub import resolve_model_dir
    from phi3_lora.model_folder import read_model_config

    config = None
    if model is not None:
        config = read_model_config(resolve_model_dir(model, with_weights=False))
    untold = Untold(alpha, prefix, _parts(enable))
    result = convert(Path(source), Path(target), to=to, config=config, untold=untold)
    for text in result.notes:
        note(text)
    if as_json:
        raw = result.to_dict()
        print_json({k: v for k, v in raw.items() if k != "notes"})
        return
    exact = "exactly" if result.lossless else f"to {result.max_weight_difference:.2e}"
    click.echo(f"{result.source} -> {result.to}: {result.tensors} tensors, {exact}, in {target}")


def _parts(enable: str | None) -> list[str]:
    names = [name.strip() for name in (enable or "").split(",") if name.strip()]
    unknown = sorted(set(names) - {"q", "k", "v", "gate", "up"})
    if unknown:
        raise click.UsageError(f"--enable {unknown[0]!r}: allowed are q, k, v, gate, up")
    return names
