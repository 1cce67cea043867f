"""Rows that are too long: dropped, shortened by whole turns, or refused; a turn is never cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents.dataset import build_dataset
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.selection import Dataset
from phi3_lora.data.documents.truncation import without_turns
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.errors import DataError

END = "<|end|>"
LEFT, RIGHT = "truncate_left", "truncate_right"


def row(*turns: str, system: str | None = None, source: str = "f:1", **more: Any) -> Conversation:
    roles = ("user", "assistant")
    spoken = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    head = [] if system is None else [{"role": "system", "content": system}]
    return Conversation(tuple(head + spoken), source, **more)


def build(
    tokenizer: ChatTokenizer, rows: Sequence[Conversation], limit: int, too_long: str, **more: Any
) -> Dataset:
    encoding = Encoding(**{"max_length": limit, "too_long": too_long, **more})
    return build_dataset(rows, tokenizer, encoding, "training data")


def texts(tokenizer: ChatTokenizer, dataset: Dataset) -> list[str]:
    return [
        tokenizer.decode(d.tokens.tolist(), skip_special_tokens=False) for d in dataset.documents
    ]


def length(tokenizer: ChatTokenizer, conversation: Conversation) -> int:
    return len(tokenizer.encode_conversations([conversation])[0].tokens)


THREE = row("a1", "b1", "a2", "b2", "a3", "b3", system="sys")
SHORT = row("q", "r", source="f:2")


def test_a_row_that_is_too_long_is_dropped_and_counted(tokenizer: ChatTokenizer) -> None:
    dataset = build(tokenizer, [THREE, SHORT], 20, "drop")
    assert [d.source for d in dataset.documents] == ["f:2"]
    longest = length(tokenizer, THREE)
    assert dataset.notes == [
        "training data: dropped 1 of 2 rows longer than max_length 20 tokens "
        f"(longest {longest}; first f:1)"
    ]


def test_the_oldest_turns_go_and_the_system_message_stays(tokenizer: ChatTokenizer) -> None:
    expected = row("a2", "b2", "a3", "b3", system="sys")
    dataset = build(tokenizer, [THREE, SHORT], length(tokenizer, expected), LEFT)
    (document,) = tokenizer.encode_conversations([expected])
    np.testing.assert_array_equal(dataset.documents[0].tokens, document.tokens)
    np.testing.assert_array_equal(dataset.documents[0].supervised, document.supervised)
    assert [d.source for d in dataset.documents] == ["f:1", "f:2"]
    assert "shortened 1 of 2 rows" in dataset.notes[0] and "first f:1" in dataset.notes[0]


def test_the_last_turns_go_where_asked(tokenizer: ChatTokenizer) -> None:
    expected = row("a1", "b1", "a2", "b2", system="sys")
    dataset = build(tokenizer, [THREE], length(tokenizer, expected), RIGHT)
    assert texts(tokenizer, dataset)[0].endswith(f"<|assistant|>b2{END}<|endoftext|>")
    assert dataset.documents[0].loss_tokens == 6


@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_an_answer_that_does_not_fit_is_never_cut(tokenizer: ChatTokenizer, side: str) -> None:
    rows = [row("q", "x" * 100), row("q", "x" * 100, "q", "x" * 100, source="f:3"), SHORT]
    dataset = build(tokenizer, rows, 50, side)
    assert [d.source for d in dataset.documents] == ["f:2"]
    assert dataset.notes[0].startswith("training data: dropped 2 of 3 rows longer than")


def test_a_long_last_answer_leaves_the_turns_before_it_only_from_the_right(
    tokenizer: ChatTokenizer,
) -> None:
    rows = [row("a", "b", "c", "x" * 100), SHORT]
    assert len(build(tokenizer, rows, 50, LEFT).documents) == 1
    kept = build(tokenizer, rows, 50, RIGHT)
    assert texts(tokenizer, kept)[0] == f"<|user|>a{END}<|assistant|>b{END}<|endoftext|>"


def test_no_other_answer_becomes_the_last_one(tokenizer: ChatTokenizer) -> None:
    rows = [row("a", "b", "c", "x" * 100), SHORT]
    dataset = build(tokenizer, rows, 50, RIGHT, loss_on="last")
    assert [d.source for d in dataset.documents] == ["f:2"]
    assert any("dropped 1 of 2 rows without a supervised token" in n for n in dataset.notes)


def test_weights_stay_with_their_turns(tokenizer: ChatTokenizer) -> None:
    weights = (None, True, True, None, None, None, False)
    conversation = row("a1", "b1", "a2", "b2", "a3", "b3", system="sys", weights=weights)
    shorter = row("a2", "b2", "a3", "b3", system="sys")
    dataset = build(tokenizer, [conversation], length(tokenizer, shorter), LEFT)
    (document,) = dataset.documents
    learnt = tokenizer.decode(
        document.tokens[document.supervised].tolist(), skip_special_tokens=False
    )
    assert learnt == f"b2{END}"


def test_a_question_without_an_answer_counts_as_a_turn() -> None:
    conversation = row("a", "b", "c")
    assert without_turns(conversation, 1, RIGHT).messages == conversation.messages[:2]
    assert without_turns(conversation, 1, LEFT).messages == conversation.messages[2:]


@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_plain_text_has_no_turns_to_lose(tokenizer: ChatTokenizer, side: str) -> None:
    text = Conversation(({"role": "user", "content": "x" * 60},), "t:1", whole=True)
    dataset = build(tokenizer, [text, SHORT], 50, side)
    assert [d.source for d in dataset.documents] == ["f:2"]


def test_rows_that_are_too_long_are_refused_where_asked(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError) as problem:
        build(tokenizer, [SHORT, THREE], 20, "error")
    text = str(problem.value)
    assert "longer than max_length 20 tokens: 1 of 2 rows" in text
    assert f"f:1: {length(tokenizer, THREE)} tokens" in text and "data.too_long" in text
    assert len(build(tokenizer, [SHORT], 20, "error").documents) == 1


def test_the_models_context_is_a_limit_too(tokenizer: ChatTokenizer) -> None:
    dataset = build(tokenizer, [THREE, SHORT], 500, LEFT, context=20)
    assert max(len(d.tokens) for d in dataset.documents) <= 20
    assert "longer than the model's context of 20 tokens" in dataset.notes[0]


def test_a_row_without_a_supervised_token_is_dropped_and_counted(
    tokenizer: ChatTokenizer,
) -> None:
    silent = row("a", "b", weights=(None, False))
    dataset = build(tokenizer, [silent, SHORT], 50, "drop")
    assert len(dataset.documents) == 1
    assert dataset.notes == [
        "training data: dropped 1 of 2 rows without a supervised token (first f:1)"
    ]
    with pytest.raises(DataError, match="no row is left to learn from"):
        build(tokenizer, [silent], 50, "drop")


def test_each_remark_on_rows_is_counted_in_one_note(tokenizer: ChatTokenizer) -> None:
    rows = [SHORT, row(f"say {END}", "  r", source="f:3"), row("\nq", " r", source="f:4")]
    dataset = build(tokenizer, rows, 50, "drop")
    assert dataset.notes == [
        "training data: 1 of 3 rows hold markers as text, kept as text (first f:3)",
        "training data: 2 of 3 rows lose white space that markers beside a message strip (4 in "
        "all; first f:3)",
    ]


def test_rows_that_cannot_be_rendered_are_skipped_and_named_where_asked(
    tokenizer: ChatTokenizer,
) -> None:
    rows = [row("a", "\ud800", source="f:7"), SHORT]
    with pytest.raises(DataError, match=r"1 row\(s\) cannot be rendered:\n  f:7: message 2"):
        build(tokenizer, rows, 50, "drop")
    dataset = build(tokenizer, rows, 50, "drop", on_bad_row="skip")
    assert [d.source for d in dataset.documents] == ["f:2"]
    assert "skipped 1 row" in dataset.notes[0] and "f:7: message 2" in dataset.notes[0]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=8),
    limit=st.integers(5, 200),
    side=st.sampled_from([LEFT, RIGHT]),
    system=st.none() | st.just("sys"),
)
def test_as_few_turns_as_needed_go(
    tokenizer: ChatTokenizer,
    sizes: list[tuple[int, int]],
    limit: int,
    side: str,
    system: str | None,
) -> None:
    turns = [text for q, a in sizes for text in ("q" * q, "a" * a)]
    conversation = row(*turns, system=system)
    candidates = [
        row(*(turns[2 * k :] if side == LEFT else turns[: len(turns) - 2 * k]), system=system)
        for k in range(len(sizes))
    ]
    fitting = [c for c in candidates if length(tokenizer, c) <= limit]
    try:
        found = build(tokenizer, [conversation], limit, side).documents
    except DataError:
        found = []
    expected = tokenizer.encode_conversations(fitting[:1])
    assert [d.tokens.tolist() for d in found] == [d.tokens.tolist() for d in expected]
    assert [d.supervised.tolist() for d in found] == [d.supervised.tolist() for d in expected]
