"""phi3-lora convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phi3_lora_cli.options import note, output_options, part_names, print_json, untold_options

_LAYOUTS = ("peft", "mlx", "both", "unfused", "loralib", "gguf")
_TOOLS = ("vllm", "llama.cpp", "ollama", "mlx-lm", "peft")


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--to", type=click.Choice(_LAYOUTS), help="The layout; --for knows it by itself.")
@click.option("--for", "consumer", type=click.Choice(_TOOLS), help="Keep this tool's rules.")
@click.option("--model", metavar="ID|DIR|demo", help="The base model.")
@click.option(
    "--verify", is_flag=True, help="Compare the result with SRC; exit code 3 if it differs."
)
@click.option("--rank", type=click.IntRange(min=1), help="Cut deltas of a higher rank, with loss.")
@untold_options
@output_options
def command(
    source: str,
    target: str,
    to: str | None,
    consumer: str | None,
    model: str | None,
    verify: bool,
    rank: int | None,
    alpha: float | None,
    prefix: str,
    enable: str | None,
    parts: str | None,
    as_json: bool,
) -> int:
    """Move an adapter between layouts: PEFT, mlx-lm, unfused q, k, v (Unsloth), loralib, GGUF.

    SRC's layout is told by its content. The result is read back and compared. unfused needs --model
    for the sizes of q, k and v; so does an unfused SRC that leaves one of them out. With --verify
    and --model, the answers of the model with both are compared too.

    \b
    Example:
      phi3-lora convert mlx_adapter peft_adapter --to peft --verify
    """
    from phi3_lora.adapters.convert import Job, convert
    from phi3_lora.adapters.formats.folder import check_unused
    from phi3_lora.adapters.formats.loralib import Untold
    from phi3_lora.export.ollama import write_adapter_modelfile
    from phi3_lora.hub.download import resolve_adapter_dir
    from phi3_lora.inference.base_model import look_at_model

    layout = _layout(to, consumer)
    base = None if model is None else look_at_model(model, with_weights=verify)
    if consumer == "ollama" and base is None:
        raise click.UsageError("--for ollama needs --model: a Modelfile holds its template")
    if consumer == "ollama":
        check_unused(Path(target))
    job = Job(
        source=resolve_adapter_dir(source),
        target=Path(target) / "adapter.gguf" if consumer == "ollama" else Path(target),
        to=layout,
        consumer=consumer,
        config=None if base is None else base.config,
        row_norms=None if base is None else base.row_norms,
        untold=Untold(alpha, prefix, part_names(enable), parts),
        rank=rank,
    )
    result = convert(job)
    if consumer == "ollama" and base is not None:
        note(write_adapter_modelfile(Path(target), base.path, base.config))
    for text in result.notes:
        note(text)
    found = _verify(job, result, base) if verify else {}
    if as_json:
        print_json({**result.to_dict(), "notes": result.notes, **found})
    else:
        _tell(result, target, found)
    return 0 if found.get("equal", True) else 3


def _layout(to: str | None, consumer: str | None) -> str:
    from phi3_lora.adapters.formats.tools import CONSUMERS

    layout = to or (CONSUMERS[consumer].layout if consumer else None)
    if layout is None:
        raise click.UsageError("say where to: --to LAYOUT or --for TOOL")
    reads = CONSUMERS[consumer].layout if consumer else layout
    if layout != reads and not (layout == "both" and reads in ("peft", "mlx")):
        raise click.UsageError(f"--for {consumer} reads {reads}: leave out --to {layout}")
    return layout


def _verify(job: Any, result: Any, base: Any) -> dict[str, Any]:
    """The differences, and whether they are only roundings."""
    from phi3_lora.adapters.convert import SAME
    from phi3_lora.engine.registry import available_backends
    from phi3_lora.verification.conversion import compare_answers

    found = {
        "max_relative_difference": result.max_relative_difference,
        "worst_module": result.worst_module,
        "equal": result.max_relative_difference <= SAME,
    }
    if base is None:
        return found
    backends, reasons = available_backends("cpu")
    for reason in reasons:
        note(reason)
    if not backends:
        note("no backend can run here: the model's answers were not compared")
        return found
    answers = compare_answers(base, result.adapters, job.target, backends, note)
    equal = bool(found["equal"]) and all(answer.is_equal for answer in answers)
    return {**found, "answers": [answer.to_dict() for answer in answers], "equal": equal}


def _tell(result: Any, target: str, found: dict[str, Any]) -> None:
    exact = "exactly" if result.lossless else f"to {result.max_weight_difference:.2e}"
    click.echo(f"{result.source} -> {result.to}: {result.tensors} tensors, {exact}, in {target}")
    if not found:
        return
    worst = found["worst_module"]
    click.echo(
        f"largest difference of a delta, relative: {found['max_relative_difference']:.2e}"
        + (f" ({worst})" if found["max_relative_difference"] else "")
    )
    for answer in found.get("answers", []):
        click.echo(
            f"logits, {answer['reader']}: {answer['max_difference']:.2e} of their standard "
            "deviation"
        )
    click.echo("verified: the same adapter" if found["equal"] else "NOT the same adapter")
