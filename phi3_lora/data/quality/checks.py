"""What is wrong with data, row by row, and what it is like."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.documents.truncation import LEFT, RIGHT, shorten
from phi3_lora.data.quality.cleaning import (
    Cleaning,
    Finding,
    Step,
    num_chars,
    repeat_finding,
    row_steps,
)
from phi3_lora.data.quality.duplicates import NearIndex, exact_duplicates, said, spoken_text
from phi3_lora.data.quality.leakage import leaks_in
from phi3_lora.data.quality.report import Lengths, Problem, Report
from phi3_lora.data.quality.text_checks import marker_in
from phi3_lora.data.rows.conversation import BAD, BadRow, Conversation
from phi3_lora.data.sources.reading import iterate_rows
from phi3_lora.data.sources.source import Source
from phi3_lora.errors import DataError

_ROWS_AT_ONCE = 1000

Row = Conversation | BadRow
Rows = list[Conversation]


class Base(NamedTuple):
    """What a check knows of the base model."""

    tokenizer: ChatTokenizer
    context: int
    """Tokens that the model takes."""
    loss_on: str = "assistant"
    """What the loss counts on: assistant, last or all."""
    max_length: int | None = None
    """Tokens that training gives a row; None leaves it to the context."""
    too_long: str = "drop"
    """What training makes of longer rows: drop, truncate_left, truncate_right or error."""

    @property
    def limit(self) -> int:
        """Tokens that a row may have in training."""
        return min(self.context, self.max_length or self.context)

    @property
    def limit_name(self) -> str:
        """The limit as messages call it."""
        if self.limit < self.context:
            return f"max_length {self.limit:,}"
        return f"the model's context of {self.limit:,}"


class Previewed(NamedTuple):
    """A row as it is trained on, or as it would be."""

    document: Document
    """Shortened if training shortens it; whole if training leaves it out."""
    training: str
    """kept, shortened, dropped or error (training stops)."""
    remark: str
    """Why it is not kept as it is; else empty."""


def check_rows(
    train: Sequence[Row],
    valid: Sequence[Row] = (),
    *,
    base: Base | None = None,
    near: bool = True,
    limits: Cleaning | None = None,
) -> Report:
    """Look at every row, going on after each problem.

    Args:
        train: rows to train on.
        valid: rows to validate on.
        base: the base model's tokenizer and context; None measures lengths in characters.
        near: whether to look for near duplicates.
        limits: bounds in characters, patterns and a language that rows must keep to.

    Raises:
        DataError: when there is nothing to train on.
        ConfigError: when a library that is needed is not installed, or a language is unknown.
    """
    if not train:
        raise DataError("there are no rows to check")
    steps = _steps(limits or Cleaning())
    bad = [row for row in (*train, *valid) if isinstance(row, BadRow)]
    train_rows = [row for row in train if isinstance(row, Conversation)]
    valid_rows = [row for row in valid if isinstance(row, Conversation)]
    rows = train_rows + valid_rows
    found = [_problem(row.source, Finding(row.kind, row.problem)) for row in bad]
    for row in rows:
        findings = [step(row) for _, step in steps]
        found += [_problem(row.source, finding) for finding in findings if finding is not None]
    found += _repeats(train_rows, valid_rows, near)
    files = list(dict.fromkeys(_place(row.source)[0] for row in (*train, *valid)))
    report = Report(
        files=files,
        num_rows=len(rows),
        num_valid_rows=len(valid_rows),
        problems=found,
        lengths=Lengths("characters", np.array([num_chars(r) for r in rows], dtype=np.int64)),
        near_duplicates=near,
    )
    if base is not None:
        _measure_tokens(report, rows, base)
    order = {file: i for i, file in enumerate(files)}
    report.problems.sort(key=lambda p: (order[p.file], p.line))
    return report


def _steps(limits: Cleaning) -> list[tuple[str, Step]]:
    """What looks at each row: limits as they are set, and what is wrong in any data."""
    always = row_steps(Cleaning(unicode=True, white_space=True, empty=True))
    return [*always, ("markers", _find_marker), ("weights", _find_no_weight), *row_steps(limits)]


def _problem(source: str, finding: Finding) -> Problem:
    return Problem(*_place(source), finding.kind, finding.message)


def _place(source: str) -> tuple[str, int]:
    file, _, line = source.rpartition(":")
    return file, int(line)


def _find_marker(row: Conversation) -> Finding | None:
    for i, message in enumerate(row.messages, start=1):
        marker = marker_in(said(message))
        if marker is not None:
            text = f"message {i} ({message['role']}): {marker} is read as plain text"
            return Finding("marker-text", text)
    return None


def _find_no_weight(row: Conversation) -> Finding | None:
    if row.weights is None or not all(weight is False for weight in row.weights):
        return None
    return Finding("no-loss", "every turn has weight 0")


def _repeats(train: Rows, valid: Rows, near: bool) -> list[Problem]:
    """Repeated rows within the training data and within the validation data, and leaks."""
    rows, border = train + valid, len(train)
    index = NearIndex([spoken_text(row) for row in rows]) if near else None
    found = []
    for first, last in ((0, border), (border, len(rows))):
        exact = exact_duplicates(rows[first:last])
        matches = [m._replace(row=m.row + first, other=m.other + first) for m in exact]
        told = {m.row for m in matches}
        for match in index.duplicates(first, last) if index else ():
            if match.row not in told:
                told.add(match.row)
                matches.append(match)
        for match in matches:
            finding = repeat_finding(match, rows[match.other])
            found.append(_problem(rows[match.row].source, finding))
    for match in leaks_in(train, valid, index):
        other = train[match.other].source
        text = f"{match.similarity:.2f} like the training row {other}"
        if match.is_exact:
            text = f"is in the training data, too: {other}"
        found.append(_problem(valid[match.row].source, Finding("leak", text)))
    return found


def _measure_tokens(report: Report, rows: Rows, base: Base) -> None:
    """Put lengths in tokens, their share in the loss and what they show into a report."""
    lengths: list[int] = []
    report.loss_tokens = 0
    told = {(p.file, p.line, p.kind) for p in report.problems}
    # In parts: only counts are kept of a document.
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[first : first + _ROWS_AT_ONCE]
        documents, refused = base.tokenizer.encode_rows(part, loss_on=base.loss_on)
        reasons = iter(refused)
        for row, document in zip(part, documents, strict=True):
            if document is None:
                reason = next(reasons).removeprefix(f"{row.source}: ")
                report.problems.append(_problem(row.source, Finding(BAD, reason)))
                continue
            lengths.append(len(document.tokens))
            report.loss_tokens += document.loss_tokens
            problems = (
                _problem(row.source, finding) for finding in _token_findings(document, base)
            )
            report.problems += [p for p in problems if (p.file, p.line, p.kind) not in told]
    report.num_tokens = sum(lengths)
    report.lengths = Lengths("tokens", np.array(lengths, dtype=np.int64))


def _token_findings(document: Document, base: Base) -> Iterator[Finding]:
    count = len(document.tokens)
    if count > base.limit:
        yield Finding("too-long", f"{count:,} tokens, more than {base.limit_name}")
    if document.loss_tokens == 0:
        yield Finding("no-loss", "no token is in the loss")
    if document.remarks.lacks_system:
        yield Finding("system-lost", "the chat template has no place for the system message")
    if document.remarks.has_marker_text:
        yield Finding("marker-text", "the text of a special token is read as plain text")


def as_trained(rows: Rows, base: Base) -> list[Previewed]:
    """Rows as training takes them.

    Raises:
        DataError: when the chat template refuses a row.
    """
    encode = functools.partial(base.tokenizer.encode_conversations, loss_on=base.loss_on)
    found = []
    for row, whole in zip(rows, encode(rows), strict=True):
        document, training, remark = whole, "kept", ""
        if len(whole.tokens) > base.limit:
            remark = f"{len(whole.tokens):,} tokens, more than {base.limit_name}"
            training = "error" if base.too_long == "error" else "dropped"
            shorter = None
            if base.too_long in (LEFT, RIGHT):
                (shorter,) = shorten(
                    [row], encode, limit=base.limit, side=base.too_long, loss_on=base.loss_on
                )
            if shorter is not None:
                document, training = shorter, "shortened"
        if training in ("kept", "shortened") and document.loss_tokens == 0:
            training, remark = "dropped", "no token is in the loss"
        found.append(Previewed(document, training, remark))
    return found


def first_rows(sources: Sequence[Source], limit: int) -> list[Conversation]:
    """The first rows of sources; no more is read than is needed.

    Raises:
        DataError: when a source does not exist, there are no rows, or one of these rows is bad.
    """
    rows = []
    for row in itertools.islice(iterate_rows(sources), limit):
        if isinstance(row, BadRow):
            raise DataError(f"{row} (phi3-lora data check lists all that is wrong)")
        rows.append(row)
    if not rows:
        raise DataError(f"{', '.join(map(str, sources))}: there are no rows")
    return rows
