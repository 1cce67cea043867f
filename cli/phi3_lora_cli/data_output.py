"""Results of phi3-lora data, printed as text."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import click

from phi3_lora.data.quality.report import Lengths, Report, spread
from phi3_lora.errors import MAX_SHOWN

if TYPE_CHECKING:
    from phi3_lora.api.data_files import SplitResult

_BAR_WIDTH = 40
_LONGEST_LABEL = 60
"""Most characters shown of a label, which may be a whole text."""


def print_report(report: Report) -> None:
    """Print a report: some problems of every kind, then lengths and counts."""
    for problem in spread(report.problems, MAX_SHOWN):
        click.echo(_printable(str(problem)))
    if len(report.problems) > MAX_SHOWN:
        rest = len(report.problems) - MAX_SHOWN
        click.echo(f"... and {rest:,} more (--json lists all)")
    if report.problems:
        click.echo("")
    train = report.num_rows - report.num_valid_rows
    click.echo(f"rows             {train:,} to train on, {report.num_valid_rows:,} to validate on")
    if len(report.lengths.values):
        _print_lengths(report.lengths)
    if report.loss_share is not None:
        click.echo(
            f"in the loss      {report.loss_tokens:,} of {report.num_tokens:,} tokens "
            f"({report.loss_share:.1%})"
        )
    if not report.problems:
        click.echo("no problem found")
        return
    click.echo(f"problems         {len(report.problems):,}")
    for kind, count in report.counts().items():
        click.echo(f"  {kind.ljust(15)}{count:>9,}")


def _print_lengths(lengths: Lengths) -> None:
    found = lengths.to_dict()
    click.echo(
        f"{found['unit']} a row".ljust(17) + f"least {found['min']:,.0f}, median "
        f"{found['median']:,.0f}, 95 % at most {found['p95']:,.0f}, greatest {found['max']:,.0f}"
    )
    _print_histogram(lengths.histogram())


def _print_histogram(bins: list[tuple[int, int, int]]) -> None:
    most = max((rows for _, _, rows in bins), default=1)
    edge = max((len(f"{b[1]:,}") for b in bins), default=1)
    columns = shutil.get_terminal_size().columns
    width = max(1, min(_BAR_WIDTH, columns - 2 * edge - len("   to ,           ") - 1))
    for least, greatest, rows in bins:
        # A bin with few rows still gets a bar.
        bar = "\u2588" * max(round(width * rows / most), rows > 0)
        click.echo(f"  {least:>{edge},} to {greatest:>{edge},}  {rows:>9,} {bar}".rstrip())


def _printable(text: str) -> str:
    """Escape characters that could control the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_split(result: SplitResult) -> None:
    """Print the files of a split and their numbers of rows."""
    split, figures = result.split, result.to_dict()
    click.echo(f"{figures['train']}  {figures['num_train_rows']:,} rows")
    click.echo(f"{figures['valid']}  {result.num_valid_rows:,} rows")
    if split.num_groups < split.num_rows:
        click.echo(
            f"{split.num_rows:,} rows in {split.num_groups:,} sets that stay together, the largest "
            f"of {split.largest_group:,}"
        )
    # Largest labels first, since a key with many values is shown only in part.
    largest = sorted(split.labels.items(), key=lambda item: -sum(item[1]))
    for label, (train, valid) in largest[:MAX_SHOWN]:
        name = label if len(label) <= _LONGEST_LABEL else label[:_LONGEST_LABEL] + "..."
        click.echo(_printable(f"  {name}: {train:,} and {valid:,}"))
    if len(largest) > MAX_SHOWN:
        click.echo(f"  ... and {len(largest) - MAX_SHOWN:,} more labels (--json lists all)")
    missing = sum(not valid for _, valid in split.labels.values())
    if missing:
        click.echo(f"  {missing:,} of {len(largest):,} labels have no row to validate on")
