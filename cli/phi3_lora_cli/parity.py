"""phi3-lora parity."""

from __future__ import annotations

import dataclasses
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
    from phi3_lora.engine.lora_spec import LoraSpec
    from phi3_lora.engine.registry import available_backends
    from phi3_lora.errors import BackendUnavailableError
    from phi3_lora.inference.base_model import look_at_model
    from phi3_lora.inference.loading import load_adapter, prepare_weights
    from phi3_lora.verification.parity import Trial, cross_laws, measure, own_laws, random_start

    base = look_at_model(model, revision, quantize=quantize)
    weights = None if adapter is None else load_adapter(adapter, base)
    shapes = base.config.linear_shapes()
    spec = LoraSpec.uniform(shapes, r=8, scaling=2.0) if weights is None else weights.spec
    start = random_start(spec, shapes) if weights is None else weights.weights
    trial = Trial(base, _documents(base, data, 4 * steps), spec, start, steps)
    backends, reasons = available_backends(device)
    if not backends:
        raise BackendUnavailableError("no backend can run here:\n  " + "\n  ".join(reasons))
    for reason in reasons:
        note(reason)
    laws: list[Any] = []
    measured: list[Any] = []
    ready = {name: prepare_weights(base, b, note)[0] for name, b in backends.items()}
    for name, backend in backends.items():
        trial = dataclasses.replace(trial, base=ready[name])
        other = measured[0].trained if measured else None
        measured.append(measure(trial, backend, device, other))
        laws += own_laws(name, measured[-1])
    if len(measured) == 2:
        laws = [*cross_laws(*measured), *laws]
    else:
        note("one backend only: the laws between backends were not run; verify needs just one")
    holds = all(law.holds for law in laws)
    if as_json:
        rows = [law.to_dict() for law in laws]
        print_json({"laws": rows, "backends": list(backends), "holds": holds})
    else:
        _print(laws)
    return 0 if holds else 3


def _documents(base: Any, data: str | None, limit: int) -> Any:
    from phi3_lora.data.documents.dataset import build_dataset, resolve_scoring_file
    from phi3_lora.data.documents.encoding import Encoding
    from phi3_lora.data.sources.reading import read_conversations
    from phi3_lora.verification.fingerprint import probe_documents

    if data is None:
        return probe_documents(base.tokenizer)
    rows = read_conversations(resolve_scoring_file(data))[:limit]
    encoding = Encoding(max_length=2048, context=base.config.max_position_embeddings)
    dataset = build_dataset(rows, base.tokenizer, encoding, data)
    for text in dataset.notes:
        note(text)
    return dataset.documents


def _print(laws: list[Any]) -> None:
    width = max(len(law.what) for law in laws)
    click.echo(f"law  {'what'.ljust(width)}       value        gate")
    for law in laws:
        word = "holds" if law.holds else "MISSED"
        click.echo(
            f"{law.law}   {law.what.ljust(width)}  {law.value:>10.2e}  {law.gate:>10.2e}  {word}"
        )
