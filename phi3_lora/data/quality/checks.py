"""Check of data: problems of each row, and statistics of all rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.documents.encoding import (
    SHORTENED,
    TOO_LONG,
    Encoding,
    InMemory,
    encode_part,
)
from phi3_lora.data.documents.selection import Selection
from phi3_lora.data.options import Outcome
from phi3_lora.data.quality.cleaning import (
    Cleaning,
    Finding,
    Step,
    num_chars,
    repeat_finding,
    row_steps,
)
from phi3_lora.data.quality.duplicates import (
    NearIndex,
    exact_duplicates,
    message_text,
)
from phi3_lora.data.quality.leakage import find_leaks
from phi3_lora.data.quality.report import Lengths, Problem, Report
from phi3_lora.data.quality.text_checks import marker_in
from phi3_lora.data.rows.conversation import BAD, BadRow, Conversation
from phi3_lora.data.sources.reading import iterate_rows
from phi3_lora.data.sources.source import Source
from phi3_lora.errors import DataError

_ROWS_AT_ONCE = 1000

Row = Conversation | BadRow
Rows = list[Conversation]


class TokenBudget(NamedTuple):
    """The tokenizer and the encoding settings of training, to measure rows in tokens."""

    tokenizer: ChatTokenizer
    encoding: Encoding


class Previewed(NamedTuple):
    """A row as training encodes it, and whether training keeps it."""

    document: Document
    """The document; shortened if training shortens it, whole if training leaves it out."""
    training: Outcome
    """How training treats the row."""
    remark: str
    """Why the row is not kept as it is; otherwise empty."""


def check_rows(
    train: Sequence[Row],
    valid: Sequence[Row] = (),
    *,
    budget: TokenBudget | None = None,
    near: bool = True,
    limits: Cleaning | None = None,
) -> Report:
    """Check every row, and report all problems.

    Args:
        train: rows to train on.
        valid: rows to validate on.
        budget: the base model's tokenizer and limits; None measures lengths in characters.
        near: True to look for near duplicates.
        limits: limits in characters, patterns and the language that rows must meet.

    Raises:
        DataError: when there are no training rows.
        ConfigError: when a required library is not installed, or the language is unknown.
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
    if budget is not None:
        _measure_tokens(report, rows, budget)
    order = {file: i for i, file in enumerate(files)}
    report.problems.sort(key=lambda p: (order[p.file], p.line))
    return report


def _steps(limits: Cleaning) -> list[tuple[str, Step]]:
    """Return the checks of single rows: the standard ones, then the limits that are set."""
    always = row_steps(Cleaning(unicode=True, white_space=True, empty=True))
    return [*always, ("markers", _find_marker), ("weights", _find_no_weight), *row_steps(limits)]


def _problem(source: str, finding: Finding) -> Problem:
    return Problem(*_place(source), finding.kind, finding.message)


def _place(source: str) -> tuple[str, int]:
    file, _, line = source.rpartition(":")
    return file, int(line)


def _find_marker(row: Conversation) -> Finding | None:
    for i, message in enumerate(row.messages, start=1):
        marker = marker_in(message_text(message))
        if marker is not None:
            text = f"message {i} ({message['role']}): {marker} is read as plain text"
            return Finding("marker-text", text)
    return None


def _find_no_weight(row: Conversation) -> Finding | None:
    if row.weights is None or not all(weight is False for weight in row.weights):
        return None
    return Finding("no-loss", "every turn has weight 0")


def _repeats(train: Rows, valid: Rows, near: bool) -> list[Problem]:
    """Find repeated rows within training data, repeated rows within validation data, and leaks."""
    rows, border = train + valid, len(train)
    index = NearIndex.of_rows(rows) if near else None
    found = []
    for first, last in ((0, border), (border, len(rows))):
        exact = exact_duplicates(rows[first:last])
        matches = [m._replace(row=m.row + first, other=m.other + first) for m in exact]
        known = {m.row for m in matches}
        for match in index.duplicates(first, last) if index else ():
            if match.row not in known:
                known.add(match.row)
                matches.append(match)
        for match in matches:
            finding = repeat_finding(match, rows[match.other])
            found.append(_problem(rows[match.row].source, finding))
    for match in find_leaks(train, valid, index):
        other = train[match.other].source
        text = f"{match.similarity:.2f} like the training row {other}"
        if match.is_exact:
            text = f"is in the training data, too: {other}"
        found.append(_problem(valid[match.row].source, Finding("leak", text)))
    return found


def _measure_tokens(report: Report, rows: Rows, budget: TokenBudget) -> None:
    """Add lengths in tokens, the number of loss tokens, and problems of documents to a report."""
    tokenizer, encoding = budget
    lengths: list[int] = []
    report.loss_tokens = 0
    known = {(p.file, p.line, p.kind) for p in report.problems}
    # Rows are encoded in parts, and only counts are kept: memory stays small.
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[first : first + _ROWS_AT_ONCE]
        documents, refused = tokenizer.encode_rows(part, loss_on=encoding.loss_on)
        reasons = iter(refused)
        for row, document in zip(part, documents, strict=True):
            if document is None:
                reason = next(reasons).removeprefix(f"{row.source}: ")
                report.problems.append(_problem(row.source, Finding(BAD, reason)))
                continue
            lengths.append(len(document.tokens))
            report.loss_tokens += document.loss_tokens
            problems = (
                _problem(row.source, finding) for finding in _token_findings(document, encoding)
            )
            report.problems += [p for p in problems if (p.file, p.line, p.kind) not in known]
    report.num_tokens = sum(lengths)
    report.lengths = Lengths("tokens", np.array(lengths, dtype=np.int64))


def _token_findings(document: Document, encoding: Encoding) -> Iterator[Finding]:
    count = len(document.tokens)
    if count > encoding.limit:
        yield Finding("too-long", f"{count:,} tokens, more than {encoding.limit_name}")
    if document.loss_tokens == 0:
        yield Finding("no-loss", "no token is in the loss")
    if document.remarks.system_dropped:
        yield Finding("system-lost", "the chat template has no place for the system message")
    if document.remarks.has_marker_text:
        yield Finding("marker-text", "the text of a special token is read as plain text")


def as_trained(rows: Rows, budget: TokenBudget) -> list[Previewed]:
    """Encode rows as in training, with a remark on each row that is left out or shortened.

    Raises:
        DataError: when the chat template refuses a row.
    """
    tokenizer, encoding = budget
    parts = encode_part(rows, tokenizer, encoding)
    # A preview also shows rows that stop training.
    lenient = dataclasses.replace(encoding, too_long="drop", on_bad_row="error")
    selection = Selection(InMemory(parts), lenient, ())
    kept = set(selection.choose(np.arange(len(parts)), "rows")[0].tolist())
    found = []
    for i, (row, part) in enumerate(zip(rows, parts, strict=True)):
        training: Outcome = "kept" if i in kept else "dropped"
        remark = "" if i in kept else "no token is in the loss"
        if part.flags & (TOO_LONG | SHORTENED):
            remark = f"{part.length:,} tokens, more than {encoding.limit_name}"
        if part.flags & SHORTENED and i in kept:
            training = "shortened"
        elif part.flags & SHORTENED:
            remark = "no token is in the loss"
        elif part.flags & TOO_LONG and encoding.too_long == "error":
            training = "error"
        document = (
            part.document or tokenizer.encode_conversations([row], loss_on=encoding.loss_on)[0]
        )
        found.append(Previewed(document, training, remark))
    return found


def first_rows(sources: Sequence[Source], limit: int) -> list[Conversation]:
    """Read the first rows of sources, and no rows after them.

    Raises:
        DataError: when a source does not exist, there are no rows, or one of the rows is bad.
    """
    rows = []
    for row in itertools.islice(iterate_rows(sources), limit):
        if isinstance(row, BadRow):
            raise DataError(f"{row} (phi3-lora data check lists all problems)")
        rows.append(row)
    if not rows:
        raise DataError(f"{', '.join(map(str, sources))}: there are no rows")
    return rows
