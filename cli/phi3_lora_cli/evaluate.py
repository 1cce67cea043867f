"""phi3-lora evaluate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from phi3_lora_cli.options import (
    backend_options,
    model_options,
    note,
    on_bad_row_option,
    output_options,
    print_json,
)

if TYPE_CHECKING:
    from phi3_lora.data.options import LossOn, OnBadRow


@click.command()
@model_options
@click.option(
    "--data",
    required=True,
    metavar="FILE|DIR|ID|demo",
    help="What to score; of DIR the valid rows.",
)
@on_bad_row_option
@click.option(
    "--loss-on",
    type=click.Choice(["assistant", "last", "all"]),
    default="assistant",
    help="What the loss counts on: every answer, the last one, all tokens. Default: assistant.",
)
@backend_options
@click.option(
    "--generate", is_flag=True, help="Also let the model answer, and count exact matches."
)
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first rows.")
@click.option("--samples", type=click.IntRange(min=0), default=3, help="Answers shown.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, help="With --generate.")
@click.option(
    "--max-length", type=click.IntRange(min=2), default=2048, help="Tokens a row may have."
)
@output_options
def command(
    model: str,
    revision: str | None,
    adapter: str | None,
    data: str,
    on_bad_row: OnBadRow | None,
    loss_on: LossOn,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    quantize: str | None,
    generate: bool,
    limit: int | None,
    samples: int,
    max_new_tokens: int,
    max_length: int,
    as_json: bool,
) -> None:
    """Loss, perplexity and token accuracy of a model on a data file.

    The loss is in nats per supervised token. With --generate the model gives each row's last
    answer itself, greedily; exact match is the share of answers equal to the expected text.

    \b
    Example:
      phi3-lora evaluate --model demo --adapter runs/demo/adapter --data demo --generate
    """
    from phi3_lora.data.documents.encoding import Encoding
    from phi3_lora.inference.base_model import look_at_model
    from phi3_lora.inference.evaluation import evaluate
    from phi3_lora.inference.loading import load_adapter, open_engine
    from phi3_lora.inference.scoring_data import load_to_score

    base = look_at_model(model, revision, quantize=quantize)
    weights = None if adapter is None else load_adapter(adapter, base)
    dataset, asked = load_to_score(
        data,
        base.tokenizer,
        Encoding(
            max_length=max_length,
            context=base.config.max_position_embeddings,
            loss_on=loss_on,
            on_bad_row=on_bad_row or "error",
        ),
        limit=limit,
        with_conversations=generate,
        note=note,
    )
    opened = open_engine(
        base, backend=backend, device=device, dtype=dtype, adapter=weights, note=note
    )
    with _progress(len(dataset.documents), "scoring") as advance:
        scores = evaluate(opened.engine, dataset.documents, advance)
    result: dict[str, Any] = scores.to_dict()
    answers = []
    if generate:
        answers = _answers(opened.engine, base, asked, max_new_tokens)
        result["exact_match"] = sum(a.is_exact for a in answers) / max(1, len(answers))
        result["num_answers"] = len(answers)
    opened.engine.close()
    _show(answers[:samples])
    (print_json if as_json else _print_table)(result)


class _progress:
    """A bar on a terminal's stderr, nothing elsewhere."""

    def __init__(self, total: int, label: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda count: self._bar.update(self._task, advance=count)

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def _answers(engine: Any, base: Any, rows: Any, max_new_tokens: int) -> Any:
    from phi3_lora.engine.request import Sampling
    from phi3_lora.inference.evaluation import answer_conversations

    sampling = Sampling(max_new_tokens=max_new_tokens, stop_ids=base.stop_ids)
    with _progress(len(rows), "answering") as advance:
        return answer_conversations(engine, base.tokenizer, rows, sampling, advance)


def _show(answers: Any) -> None:
    for answer in answers:
        click.echo(f"prompt    {answer.prompt}\nexpected  {answer.expected}", err=True)
        click.echo(f"answer    {answer.given}\n", err=True)


def _print_table(result: dict[str, Any]) -> None:
    shown = {
        "loss": ("loss", "{:.4f} nats per supervised token"),
        "perplexity": ("perplexity", "{:.4f}"),
        "token_accuracy": ("token accuracy", "{:.2%}"),
        "exact_match": ("exact match", "{:.2%}"),
        "num_answers": ("answers", "{:,}"),
        "loss_tokens": ("supervised tokens", "{:,}"),
        "num_documents": ("documents", "{:,}"),
    }
    for name, (label, form) in shown.items():
        if name in result:
            click.echo(f"{label.ljust(18)} {form.format(result[name])}")
