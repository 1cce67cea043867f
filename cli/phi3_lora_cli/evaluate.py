"""The command phi3-lora evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress, TaskID

import phi3_lora
from phi3_lora_cli.options import (
    backend_options,
    given,
    model_options,
    note,
    on_bad_row_option,
    output_options,
    print_json,
)

if TYPE_CHECKING:
    from phi3_lora.inference.evaluation import Answer


@click.command()
@model_options
@click.option(
    "--data",
    required=True,
    metavar="FILE|DIR|ID|demo",
    help="Rows to score; the validation rows of a DIR.",
)
@on_bad_row_option
@click.option(
    "--loss-on",
    type=click.Choice(["assistant", "last", "all"]),
    default="assistant",
    help="Tokens in the loss: every answer, the last answer, or all. Default: assistant.",
)
@backend_options
@click.option(
    "--generate", is_flag=True, help="Also let the model answer, and count exact matches."
)
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first rows.")
@click.option(
    "--samples", type=click.IntRange(min=0), default=3, help="Answers to show. Default: 3."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=256,
    help="Most tokens of an answer, with --generate.",
)
@click.option(
    "--max-length", type=click.IntRange(min=2), default=2048, help="Tokens a row may have."
)
@output_options
def command(model: str, data: str, samples: int, as_json: bool, **options: Any) -> None:
    """Measure loss, perplexity and token accuracy of a model on data.

    The loss is in nats per supervised token. With --generate the model gives each row's last
    answer itself, greedily; exact match is the share of answers equal to the expected text.

    \b
    Example:
      phi3-lora evaluate --model demo --adapter runs/demo/adapter --data demo --generate
    """
    with _Bars() as bars:
        result = phi3_lora.evaluate(model, data, on_progress=bars.show, note=note, **given(options))
    _show((result.answers or ())[:samples])
    (print_json if as_json else _print_table)(result.to_dict())


class _Bars:
    """A progress bar for each stage, shown if stderr is a terminal."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def show(self, stage: str, done: int, total: int) -> None:
        """Move the bar of a stage; the first call for a stage starts a new bar."""
        if stage != self._stage:
            self._stop()
            console = Console(stderr=True)
            self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
            self._stage, self._task = stage, self._bar.add_task(stage, total=total)
            self._bar.start()
        assert self._bar is not None
        self._bar.update(self._task, completed=done)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()


def _show(answers: Sequence[Answer]) -> None:
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
