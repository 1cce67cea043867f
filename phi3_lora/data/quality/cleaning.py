"""Cleaning of rows by optional steps; each step reports every row that it changes or drops.

Rows are never changed in place, and files are not touched.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.quality.duplicates import (
    Match,
    NearIndex,
    exact_duplicates,
    message_text,
)
from phi3_lora.data.quality.languages import LanguageFilter
from phi3_lora.data.quality.text_checks import (
    encoding_problem,
    repaired,
    tidied,
    white_space_problem,
)
from phi3_lora.data.rows.conversation import Conversation, Message
from phi3_lora.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaning:
    """The steps to take; all are off by default."""

    unicode: bool = False
    """Convert text to Unicode NFC and remove control characters."""
    white_space: bool = False
    """Strip white space at the ends of turns; make line ends, odd and invisible spaces plain."""
    empty: bool = False
    """Drop rows with an empty user turn; remove empty system turns."""
    duplicates: bool = False
    """Keep the first of rows that differ only in white space and Unicode form."""
    near_duplicates: bool = False
    """Keep the first of rows whose word triples overlap by 0.8 or more."""
    min_chars: int | None = None
    """Drop rows with fewer characters in all turns."""
    max_chars: int | None = None
    """Drop rows with more characters in all turns."""
    min_tokens: int | None = None
    """Drop rows with fewer tokens; needs a tokenizer."""
    max_tokens: int | None = None
    """Drop rows with more tokens; needs a tokenizer."""
    patterns: tuple[str, ...] = ()
    """Drop rows in which one of these regular expressions matches."""
    language: str | None = None
    """Drop rows that are clearly not in this language (ISO 639-1, such as en)."""

    def __post_init__(self) -> None:
        for low, high in (("min_chars", "max_chars"), ("min_tokens", "max_tokens")):
            least, most = getattr(self, low), getattr(self, high)
            for name, value in ((low, least), (high, most)):
                if value is not None and value < 0:
                    raise ConfigError(f"{name} must be >= 0, got {value}")
            if least is not None and most is not None and least > most:
                raise ConfigError(f"{low} {least} is above {high} {most}: no row could stay")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as cause:
                raise ConfigError(
                    f"the pattern {pattern!r} is not a regular expression: {cause}"
                ) from None


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of a row, and the row without the problem."""

    kind: str
    message: str
    row: Conversation | None = None
    """The corrected row; None if the row must be dropped."""


Step = Callable[[Conversation], Finding | None]


@dataclass(frozen=True, slots=True)
class Change:
    """One step's change to one row."""

    step: str
    """Name of the step: a field of Cleaning."""
    before: Conversation
    after: Conversation | None
    """The changed row; None if the row was dropped."""
    message: str

    @property
    def source(self) -> str:
        """file:line of the row."""
        return self.before.source


@dataclass(frozen=True, slots=True)
class Cleaned:
    """The remaining rows, and all changes."""

    rows: list[Conversation]
    changes: list[Change] = field(default_factory=list)
    steps: tuple[str, ...] = ()
    """Names of the steps taken, in order."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Return step -> number of rows that it `changed` and number that it `dropped`."""
        done = Counter((c.step, "dropped" if c.after is None else "changed") for c in self.changes)
        steps = dict.fromkeys(self.steps)
        return {s: {what: done[s, what] for what in ("changed", "dropped")} for s in steps}


def clean(
    rows: Sequence[Conversation], steps: Cleaning, tokenizer: ChatTokenizer | None = None
) -> Cleaned:
    """Clean rows: take steps in the order of Cleaning's fields, but duplicates last.

    Args:
        rows: the rows; they are not changed.
        steps: the steps to take.
        tokenizer: the base model's tokenizer, for limits in tokens.

    Raises:
        ConfigError: when a limit in tokens is set without a tokenizer, or a step's library is not
            installed.
        DataError: when the chat template refuses a row.
    """
    cleaned = Cleaned(list(rows))
    for name, step in row_steps(steps):
        cleaned = _take(cleaned, name, map(step, cleaned.rows))
    if steps.min_tokens is not None or steps.max_tokens is not None:
        if tokenizer is None:
            raise ConfigError("min_tokens and max_tokens need a tokenizer: give the base model's")
        lengths = [len(d.tokens) for d in tokenizer.encode_conversations(cleaned.rows)]
        limits = (steps.min_tokens, steps.max_tokens)
        name = "min_tokens" if steps.max_tokens is None else "max_tokens"
        cleaned = _take(cleaned, name, (length_finding(n, *limits, "tokens") for n in lengths))
    if steps.duplicates:
        matches = exact_duplicates(cleaned.rows)
        cleaned = _take(cleaned, "duplicates", _repeats(cleaned.rows, matches))
    if steps.near_duplicates:
        index = NearIndex.of_rows(cleaned.rows)
        matches = list(index.duplicates(0, len(cleaned.rows)))
        cleaned = _take(cleaned, "near_duplicates", _repeats(cleaned.rows, matches))
    return cleaned


def row_steps(steps: Cleaning) -> list[tuple[str, Step]]:
    """Return the name and function of each step that is set and needs only one row at a time.

    Raises:
        ConfigError: when the language is unknown, or the library to detect it is missing.
    """
    found: list[tuple[str, Step]] = []
    if steps.unicode:
        found.append(("unicode", find_encoding))
    if steps.white_space:
        found.append(("white_space", find_white_space))
    if steps.empty:
        found.append(("empty", find_empty))
    limits = (steps.min_chars, steps.max_chars)
    if limits != (None, None):
        name = "min_chars" if steps.max_chars is None else "max_chars"
        found.append((name, lambda row: length_finding(num_chars(row), *limits, "characters")))
    found += [("patterns", _pattern_step(pattern)) for pattern in steps.patterns]
    if steps.language is not None:
        found.append(("language", _language_step(LanguageFilter(steps.language))))
    return found


def _take(cleaned: Cleaned, name: str, findings: Iterable[Finding | None]) -> Cleaned:
    rows, changes = [], list(cleaned.changes)
    for row, finding in zip(cleaned.rows, findings, strict=True):
        after = row if finding is None else finding.row
        if finding is not None and after != row:
            changes.append(Change(name, row, after, finding.message))
        if after is not None:
            rows.append(after)
    return Cleaned(rows, changes, (*cleaned.steps, name))


def _repeats(rows: Sequence[Conversation], matches: Sequence[Match]) -> list[Finding | None]:
    found: list[Finding | None] = [None] * len(rows)
    for match in matches:
        found[match.row] = repeat_finding(match, rows[match.other])
    return found


def repeat_finding(match: Match, other: Conversation) -> Finding:
    """Return the finding for a row that repeats another row."""
    if match.is_exact:
        return Finding("duplicate", f"repeats {other.source}")
    return Finding("near-duplicate", f"{match.similarity:.2f} like {other.source}")


def num_chars(row: Conversation) -> int:
    """Count the characters of all turns, including tool calls."""
    return sum(len(message_text(m)) for m in row.messages)


def length_finding(length: int, least: int | None, most: int | None, unit: str) -> Finding | None:
    """Return the finding for a row whose length is outside of limits; None if it is inside."""
    if least is not None and length < least:
        return Finding("too-short", f"{length:,} {unit}, fewer than {least:,}")
    if most is not None and length > most:
        return Finding("too-long", f"{length:,} {unit}, more than {most:,}")
    return None


def find_encoding(row: Conversation) -> Finding | None:
    """Find text that was decoded wrongly or is not in Unicode NFC."""
    return _each_text(row, "encoding", encoding_problem, repaired)


def find_white_space(row: Conversation) -> Finding | None:
    """Find white space that a reader does not see, but the model does."""
    return _each_text(row, "whitespace", white_space_problem, tidied)


def _each_text(
    row: Conversation,
    kind: str,
    problem_of: Callable[[str], str | None],
    better: Callable[[str], str],
) -> Finding | None:
    problems = [(i, problem_of(m["content"])) for i, m in enumerate(row.messages, start=1)]
    texts = [f"{_name(row, i)}: {problem}" for i, problem in problems if problem is not None]
    if not texts:
        return None
    messages = tuple({**m, "content": better(m["content"])} for m in row.messages)
    return Finding(kind, "; ".join(texts), dataclasses.replace(row, messages=messages))


def find_empty(row: Conversation) -> Finding | None:
    """Find empty system and user turns; the reader of rows refuses empty answers."""
    empty = [i for i, m in enumerate(row.messages) if _is_empty(m)]
    if not empty:
        return None
    message = "; ".join(f"{_name(row, i + 1)}: empty" for i in empty)
    if any(row.messages[i]["role"] == "user" for i in empty):
        return Finding("empty", message)
    kept = [i for i in range(len(row.messages)) if i not in empty]
    weights = None if row.weights is None else tuple(row.weights[i] for i in kept)
    messages = tuple(row.messages[i] for i in kept)
    return Finding("empty", message, dataclasses.replace(row, messages=messages, weights=weights))


def _is_empty(message: Message) -> bool:
    # A system message with tools may have no text; a tool may return an empty result.
    if message["role"] not in ("system", "user") or "tools" in message:
        return False
    return not message["content"].strip()


def _pattern_step(pattern: str) -> Step:
    compiled = re.compile(pattern)

    def step(row: Conversation) -> Finding | None:
        for i, message in enumerate(row.messages, start=1):
            match = compiled.search(message_text(message))
            if match is not None:
                text = f"{_name(row, i)}: {match.group()[:60]!r} matches {pattern!r}"
                return Finding("pattern", text)
        return None

    return step


def _language_step(languages: LanguageFilter) -> Step:
    def step(row: Conversation) -> Finding | None:
        # Tool calls are left out: their keys are English in every language.
        spoken = "\n".join(m["content"] for m in row.messages if m["role"] != "system")
        other = languages.other_language(spoken)
        if other is None:
            return None
        return Finding("language", f"is in {other}, not in {languages.code}")

    return step


def _name(row: Conversation, number: int) -> str:
    return f"message {number} ({row.messages[number - 1]['role']})"
