"""Cached shapes of rows: documents equal the documents of the full renderer."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.demo import DEMO_MODEL_DIR
from phi3_lora.errors import DataError
from tests.tiny import MARKERS, TEMPLATE, write_tokenizer
from tests.unit.data.chat.test_family_templates import TEMPLATES
from tests.unit.data.chat.test_masking import (
    EATING,
    Messages,
    conversations,
    family_tokenizer,
    talk,
)

LOOP = "{% for m in messages %}"


@functools.cache
def demo_tokenizer() -> ChatTokenizer:
    return ChatTokenizer(DEMO_MODEL_DIR, vocab_size=2**31)


def in_full(tokenizer: ChatTokenizer, row: Conversation, loss_on: str) -> Document:
    """Return a row's document with the template run for this row alone."""
    rendered = tokenizer._renderer.conversation(row, loss_on)
    return tokenizer._encode_rendered({0: rendered}, [row])[0]


def assert_equal(found: Document, expected: Document) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.supervised, expected.supervised)
    assert found.tokens.dtype == expected.tokens.dtype
    assert (found.source, found.remarks) == (expected.source, expected.remarks)


def teach(tokenizer: ChatTokenizer, row: Conversation, loss_on: str = "assistant") -> None:
    """Let the tokenizer learn the row's shape from a harmless row."""
    harmless = tuple({**m, "content": "x"} for m in row.messages)
    tokenizer.encode_rows([Conversation(harmless, "x:1", row.weights)], loss_on=loss_on)


@st.composite
def rows(draw: st.DrawFn) -> Conversation:
    messages: Messages = draw(conversations())
    own = st.none() | st.tuples(*[st.sampled_from([None, True, False]) for _ in messages])
    return Conversation(messages, "x:2", draw(own))


@pytest.mark.parametrize("eats", EATING)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(row=rows(), loss_on=st.sampled_from(["assistant", "last", "all"]))
def test_a_row_like_another_is_the_document_that_its_template_gives(
    name: str, eats: str, row: Conversation, loss_on: str
) -> None:
    tokenizer = family_tokenizer(name, eats)
    teach(tokenizer, row, loss_on)
    (found,), _ = tokenizer.encode_rows([row], loss_on=loss_on)
    assert found is not None
    assert_equal(found, in_full(tokenizer, row, loss_on))


@settings(max_examples=100, deadline=None)
@given(row=rows(), loss_on=st.sampled_from(["assistant", "last", "all"]))
def test_a_row_like_another_is_the_same_document_with_a_trained_tokenizer(
    row: Conversation, loss_on: str
) -> None:
    teach(demo_tokenizer(), row, loss_on)
    (found,), _ = demo_tokenizer().encode_rows([row], loss_on=loss_on)
    assert found is not None
    assert_equal(found, in_full(demo_tokenizer(), row, loss_on))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_of_a_published_model_is_run_once_a_shape(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = family_tokenizer(name, "after")
    like = [Conversation(talk(f"q {i}", f"a < {i}\n"), f"x:{i}") for i in range(2500)]
    tokenizer.encode_rows(like[:1])

    def fails(*_: object) -> None:
        raise AssertionError("the template was run")

    monkeypatch.setattr(tokenizer._renderer, "conversation", fails)
    documents, problems = tokenizer.encode_rows(like)
    assert not problems and [d.source for d in documents if d] == [r.source for r in like]


READS_CONTENT = {
    "a word": "{% if 'zbad' in m['content'] %}B{% endif %}",
    "equality": "{% if m['content'] == 'zbad' %}B{% endif %}",
    "a list": "{% if m['content'] in ['zbad', 'worse'] %}B{% endif %}",
    "length": "{% if m['content'] | length == 4 %}B{% endif %}",
    "order": "{% if m['content'] < 'A' %}B{% endif %}",
    "a test": "{% if m['content'] is upper %}B{% endif %}",
    "a method": "{% if m['content'].startswith('z') %}B{% endif %}",
    "letters": "{% for c in m['content'] %}{% if c == 'z' %}B{% endif %}{% endfor %}",
    "a slice": "{% if m['content'][:1] == 'z' %}B{% endif %}",
    "joined text": "{% set t = m['content'] + '' %}{% if t == 'zbad' %}B{% endif %}",
    "joined text by ~": "{% set t = m['content'] ~ '' %}{% if t == 'zbad' %}B{% endif %}",
    "filled in text": "{% set t = '%s' % m['content'] %}{% if t == 'zbad' %}B{% endif %}",
    "a block": "{% set t %}{{ m['content'] }}{% endset %}{% if t == 'zbad' %}B{% endif %}",
    "a key": "{% if {'zbad': 1}[m['content']] is defined %}B{% endif %}",
    "a macro": "{% macro f(t) %}{{ t }}{% endmacro %}{% if f(m.content) == 'zbad' %}B{% endif %}",
    "another message": "{% if messages[0]['content'] == 'zbad' %}B{% endif %}",
    "the time": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("reads", READS_CONTENT)
def test_a_template_that_reads_contents_is_run_for_each_row(tmp_path: Path, reads: str) -> None:
    written = "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    template = LOOP + READS_CONTENT[reads] + written + "{% endfor %}"
    write_tokenizer(tmp_path, MARKERS, template)
    tokenizer = ChatTokenizer(tmp_path, vocab_size=264)
    row = Conversation(talk("zbad", "a"), "x:1")
    teach(tokenizer, row)
    assert tokenizer._shapes.cached(row, "assistant") is None
    (found,), problems = tokenizer.encode_rows([row])
    if found is None:
        with pytest.raises(DataError, match=re.escape(problems[0].partition(": ")[2])):
            in_full(tokenizer, row, "assistant")
    else:
        assert_equal(found, in_full(tokenizer, row, "assistant"))


def test_a_shape_is_not_taken_from_a_row_with_an_empty_turn(tokenizer: ChatTokenizer) -> None:
    empty = Conversation(talk("", "a"), "x:1")
    usual = Conversation(talk("q", "a"), "x:2")
    found, _ = tokenizer.encode_rows([empty, usual, empty])
    for document, row in zip(found, (empty, usual, empty), strict=True):
        assert document is not None
        assert_equal(document, in_full(tokenizer, row, "assistant"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    write_tokenizer(tmp_path)
    return ChatTokenizer(tmp_path, vocab_size=264)


def test_problems_of_rows_are_in_the_order_of_the_rows(tokenizer: ChatTokenizer) -> None:
    def row(i: int) -> Conversation:
        return Conversation(talk("q", " " if i % 700 == 5 else "a"), f"x:{i}")

    documents, problems = tokenizer.encode_rows([row(i) for i in range(3000)])
    expected = [i for i in range(3000) if i % 700 == 5]
    assert [i for i, d in enumerate(documents) if d is None] == expected
    assert [p.split(" ")[0] for p in problems] == [f"x:{i}:" for i in expected]


@pytest.mark.parametrize(
    "answer", ["a b", "a", f"{MARKERS[1]}", "a<|", "\ud800", "größe 🦊\n", " a"]
)
def test_markers_that_the_tokenizer_does_not_see_leave_nothing_known(
    tmp_path: Path, answer: str
) -> None:
    """A marker that counts only between words does not count next to a word."""
    template = TEMPLATE.replace("'<|user|>\n'", "'<|user|>'")
    write_tokenizer(tmp_path, MARKERS, template, eats_space=False)
    raw: dict[str, Any] = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"][4]["single_word"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = ChatTokenizer(tmp_path, vocab_size=264)
    like = [Conversation(talk(q, answer), "x:1") for q in ("!", "word", "!", "ß")]
    tokenizer.encode_rows([Conversation(talk("!", "a"), "x:1")], loss_on="all")
    found, problems = tokenizer.encode_rows(like, loss_on="all")
    assert (len(problems) == 4) == (answer == "\ud800")
    for document, row in zip(found, like, strict=True):
        if document is not None:
            assert_equal(document, in_full(tokenizer, row, "all"))
