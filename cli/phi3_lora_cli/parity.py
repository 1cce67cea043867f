"""phi3-lora parity."""

from __future__ import annotations

from typing import Any

import click

from phi3_lora_cli.options import (
    model_options,
    note,
    output_options,
    print_json,
    quantize_option,
)


@click.command()
@model_options
@click.option("--data", metavar="FILE|DIR|demo", help="Documents to use. Default: built-in texts.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Training steps."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto")
@quantize_option
@output_options
def command(
    model: str,
    revision: str | None,
    adapter: str | None,
    data: str | None,
    steps: int,
    device: str,
    quantize: str | None,
    as_json: bool,
) -> int:
    """Check on your own model that both backends give the same numbers.

    Each backend of this machine runs in float32, one after the other. Exit code 0 if every law
    holds, 3 if one does not. With one backend only, see verify.

    \b
    Example:
      phi3-lora parity --model demo --data demo --steps 5 --device cpu
    """
    from phi3_lora.engine.registry import available_backends
    from phi3_lora.errors import BackendUnavailableError
    from phi3_lora.inference.base_model import find_base_model
    from phi3_lora.inference.loading import with_adapter
    from phi3_lora.verification.parity import ParityInputs, run_laws

    base = find_base_model(model, revision, quantize=quantize)
    base, weights = with_adapter(base, adapter)
    documents = _documents(base, data, 4 * steps)
    backends, reasons = available_backends(device)
    if not backends:
        raise BackendUnavailableError("no backend can run here:\n  " + "\n  ".join(reasons))
    for reason in reasons:
        note(reason)
    inputs = ParityInputs(base, documents, weights, steps)
    result = run_laws(inputs, backends, device, note)
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result.laws)
    return 0 if result.holds else 3


def _documents(base: Any, data: str | None, limit: int) -> Any:
    from phi3_lora.data.documents.dataset import build_dataset, resolve_scoring_file
    from phi3_lora.data.sources.reading import read_conversations
    from phi3_lora.verification.fingerprint import probe_documents

    if data is None:
        return probe_documents(base.tokenizer)
    rows = read_conversations(resolve_scoring_file(data))[:limit]
    context = base.config.max_position_embeddings
    dataset = build_dataset(rows, base.tokenizer, max_length=2048, name=data, context=context)
    for text in dataset.notes:
        note(text)
    return dataset.documents


def _print(laws: tuple[Any, ...]) -> None:
    width = max(len(law.what) for law in laws)
    click.echo(f"law  {'what'.ljust(width)}       value        gate")
    for law in laws:
        word = "holds" if law.holds else "MISSED"
        click.echo(
            f"{law.law}   {law.what.ljust(width)}  {law.value:>10.2e}  {law.gate:>10.2e}  {word}"
        )
