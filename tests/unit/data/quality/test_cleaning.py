"""Cleaning steps: rows they drop or change, their messages, and unchanged input rows."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.quality.cleaning import Cleaning, clean
from phi3_lora.data.quality.text_checks import (
    encoding_problem,
    marker_in,
    repaired,
    tidied,
    white_space_problem,
)
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.errors import ConfigError
from tests.tiny import write_model


def row(
    user: str, answer: str = "yes", *, line: int = 1, system: str | None = None, **fields: Any
) -> Conversation:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(tuple(messages), f"d.jsonl:{line}", **fields)


def texts(rows: list[Conversation]) -> list[list[str]]:
    return [[m["content"] for m in r.messages] for r in rows]


@pytest.mark.parametrize(
    ("text", "problem", "better"),
    [
        ("plain", None, "plain"),
        ("caf\u00e9", None, "caf\u00e9"),
        ("cafe\u0301", "not in Unicode NFC", "caf\u00e9"),
        ("a\x00b", "control character U+0000", "ab"),
        ("a\x1b[31mb", "control character U+001B", "a[31mb"),
        ("a\x85b", "control character U+0085", "ab"),
        ("tab\tand\nline\r\n", None, "tab\tand\nline\r\n"),
        ("lost \ufffd", "U+FFFD", "lost \ufffd"),
        ("lumi\u00c3\u00a8re", "read as Windows-1252", "lumi\u00c3\u00a8re"),
        ("it\u00e2\u20ac\u2122s", "read as Windows-1252", "it\u00e2\u20ac\u2122s"),
        ("S\u00c3O PAULO", None, "S\u00c3O PAULO"),
        (
            "\u05e9\u05dc\u05d5\u05dd \U0001f44d\u200d",
            None,
            "\u05e9\u05dc\u05d5\u05dd \U0001f44d\u200d",
        ),
    ],
)
def test_unicode_is_one_form_without_controls_and_what_was_lost_is_told(
    text: str, problem: str | None, better: str
) -> None:
    found = encoding_problem(text)
    assert (found is None) is (problem is None) and (problem or "") in (found or "")
    assert repaired(text) == better


@pytest.mark.parametrize(
    ("text", "problem", "better"),
    [
        ("two  words\n\n  indented", None, "two  words\n\n  indented"),
        (" two", "white space at its start or end", "two"),
        ("two\n", "white space at its start or end", "two"),
        ("one\r\ntwo\rthree", "carriage return", "one\ntwo\nthree"),
        ("a\u00a0b\u2009c", "odd or invisible space U+00A0", "a b c"),
        ("a\u200bb\ufeffc\u00ad", "odd or invisible space U+200B", "abc"),
        ("\u4eca\u5929\u3000\u5929\u6c14", None, "\u4eca\u5929\u3000\u5929\u6c14"),
        ("\u0645\u06cc\u200c\u0631\u0648\u0645", None, "\u0645\u06cc\u200c\u0631\u0648\u0645"),
        ("   ", None, ""),
    ],
)
def test_white_space_is_plain_and_inner_spaces_stay(
    text: str, problem: str | None, better: str
) -> None:
    found = white_space_problem(text)
    assert (found is None) is (problem is None) and (problem or "") in (found or "")
    assert tidied(text) == better


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("say <|end|> now", "<|end|>"),
        ("<|im_start|>user", "<|im_start|>"),
        ("[INST] hello [/INST]", "[INST]"),
        ("<<SYS>>", "<<SYS>>"),
        ("<start_of_turn>user", "<start_of_turn>"),
        ("a <| b |> c, x[INSTANCE], <b>, a<b", None),
    ],
)
def test_markers_of_chat_templates_are_found_in_text(text: str, marker: str | None) -> None:
    assert marker_in(text) == marker


def test_no_step_is_taken_unless_it_is_set() -> None:
    rows = [row(" a\x00 ", "a"), row("", "b"), row(" a\x00 ", "a")]
    cleaned = clean(rows, Cleaning())
    assert cleaned.rows == rows and cleaned.changes == [] and cleaned.counts() == {}


def test_every_step_tells_what_it_did_to_which_row_and_is_counted() -> None:
    rows = [
        row("cafe\u0301", line=1),
        row("two ", line=2),
        row("two", line=3),
        row("", line=4),
        row("hello", system="  ", line=5),
        row("as an AI model", line=6),
    ]
    steps = Cleaning(
        unicode=True, white_space=True, empty=True, duplicates=True, patterns=("AI model",)
    )
    before = copy.deepcopy(rows)
    cleaned = clean(rows, steps)
    assert rows == before, "the input rows changed"
    assert texts(cleaned.rows) == [["caf\u00e9", "yes"], ["two", "yes"], ["hello", "yes"]]
    assert [(c.step, c.source, c.after is None) for c in cleaned.changes] == [
        ("unicode", "d.jsonl:1", False),
        ("white_space", "d.jsonl:2", False),
        ("empty", "d.jsonl:4", True),
        ("empty", "d.jsonl:5", False),
        ("patterns", "d.jsonl:6", True),
        ("duplicates", "d.jsonl:3", True),
    ]
    assert cleaned.changes[0].before == rows[0]
    assert cleaned.changes[0].message == "message 1 (user): not in Unicode NFC"
    assert cleaned.changes[-1].message == "repeats d.jsonl:2"
    assert cleaned.counts() == {
        "unicode": {"changed": 1, "dropped": 0},
        "white_space": {"changed": 1, "dropped": 0},
        "empty": {"changed": 1, "dropped": 1},
        "patterns": {"changed": 0, "dropped": 1},
        "duplicates": {"changed": 0, "dropped": 1},
    }


def test_a_step_that_cannot_repair_a_row_leaves_it_and_counts_nothing() -> None:
    rows = [row("lost \ufffd")]
    cleaned = clean(rows, Cleaning(unicode=True))
    assert cleaned.rows == rows and cleaned.changes == []


def test_the_weight_of_an_empty_system_turn_goes_with_it() -> None:
    given = row("a", "b", system="", weights=(None, False, True))
    (left,) = clean([given], Cleaning(empty=True)).rows
    assert left.weights == (False, True) and len(left.messages) == 2


def test_a_system_message_that_holds_tools_is_not_empty() -> None:
    given = row("a", "b", system="")
    with_tools = ({**given.messages[0], "tools": "[]"}, *given.messages[1:])
    rows = [Conversation(with_tools, "d.jsonl:1")]
    assert clean(rows, Cleaning(empty=True)).rows == rows


def test_what_a_message_carries_beside_its_text_stays() -> None:
    messages = (
        {"role": "user", "content": " a"},
        {"role": "assistant", "content": "b", "tool_calls": [{"name": "f"}]},
    )
    (left,) = clean([Conversation(messages, "d:1")], Cleaning(white_space=True)).rows
    assert left.messages == ({"role": "user", "content": "a"}, messages[1])


def test_near_duplicates_keep_the_first() -> None:
    text = "please tell me where the order of twelve red cups for the shop in Oslo is"
    rows = [row(text, line=1), row("something else altogether", line=2), row(text + "!", line=3)]
    cleaned = clean(rows, Cleaning(near_duplicates=True))
    assert cleaned.rows == rows[:2]
    assert cleaned.counts() == {"near_duplicates": {"changed": 0, "dropped": 1}}


def test_limits_in_characters_count_every_turn() -> None:
    rows = [row("a", "b"), row("aa", "bb"), row("aaa", "bbb")]
    cleaned = clean(rows, Cleaning(min_chars=3, max_chars=5))
    assert cleaned.rows == rows[1:2]
    messages = [c.message for c in cleaned.changes]
    assert messages == ["2 characters, fewer than 3", "6 characters, more than 5"]


def test_limits_in_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(write_model(tmp_path / "m"), vocab_size=264)
    rows = [row("a", "b"), row("a" * 50, "b" * 50)]
    lengths = [len(d.tokens) for d in tokenizer.encode_conversations(rows)]
    assert clean(rows, Cleaning(max_tokens=lengths[0]), tokenizer).rows == rows[:1]
    assert clean(rows, Cleaning(min_tokens=lengths[1]), tokenizer).rows == rows[1:]
    assert clean(rows, Cleaning(max_tokens=lengths[1]), tokenizer).rows == rows
    with pytest.raises(ConfigError, match="need a tokenizer"):
        clean(rows, Cleaning(max_tokens=5))


def test_a_pattern_drops_rows_in_any_turn_of_which_it_matches() -> None:
    rows = [row("call 555-1234", "no"), row("no", "call 555-1234"), row("call me", "no")]
    cleaned = clean(rows, Cleaning(patterns=(r"\d{3}-\d{4}",)))
    assert cleaned.rows == rows[2:]
    assert cleaned.changes[1].message == (
        "message 2 (assistant): '555-1234' matches '\\\\d{3}-\\\\d{4}'"
    )


def test_rows_clearly_in_another_language_go_and_unclear_ones_stay() -> None:
    rows = [
        row("What is the capital of France?", "It is Paris, of course.", line=1),
        row("Quelle est la capitale de la France ?", "C'est Paris, bien entendu.", line=2),
        row("3 + 4", "7", line=3),
        row("def f(x):", "return x + 1", line=4),
        row('{"a": 1}', "ok", line=5),
    ]
    cleaned = clean(rows, Cleaning(language="en"))
    assert [r.source for r in cleaned.rows] == ["d.jsonl:1", "d.jsonl:3", "d.jsonl:4", "d.jsonl:5"]
    assert cleaned.changes[0].message == "is in fr, not in en"


def test_the_language_is_judged_without_the_system_message() -> None:
    system = "Tu es un assistant qui traduit toujours en anglais et qui reste poli."
    rows = [row("What is the capital of France?", "It is Paris, of course.", system=system)]
    assert clean(rows, Cleaning(language="en")).rows == rows


def test_an_unknown_language_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ConfigError, match=r"got 'english'; known: .*\ben\b"):
        clean([row("a")], Cleaning(language="english"))


def test_without_py3langid_the_line_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ConfigError, match=r"pip install 'phi3-lora\[data\]'"):
        clean([row("a")], Cleaning(language="en"))


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"min_chars": -1}, "min_chars must be >= 0, got -1"),
        ({"min_chars": 9, "max_chars": 5}, "min_chars 9 is above max_chars 5"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens 9 is above max_tokens 5"),
        ({"patterns": ("(",)}, "'\\('.*is not a regular expression"),
    ],
)
def test_steps_that_cannot_be_taken_are_refused(settings: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        Cleaning(**settings)


def test_patterns_and_limits_see_the_calls_of_tools() -> None:
    calls = [{"function": {"name": "send", "arguments": {"to": "ann@shop.example"}}}]
    messages = (
        {"role": "user", "content": "Send it."},
        {"role": "assistant", "content": "", "tool_calls": calls},
    )
    rows = [Conversation(messages, "d.jsonl:1")]
    (change,) = clean(rows, Cleaning(patterns=(r"\w+@shop",))).changes
    assert change.message == r"message 2 (assistant): 'ann@shop' matches '\\w+@shop'"
    assert clean(rows, Cleaning(min_chars=30)).rows == rows
    assert clean(rows, Cleaning(max_chars=30)).rows == []


def test_a_step_that_finds_nothing_is_counted_as_such() -> None:
    cleaned = clean([row("a")], Cleaning(white_space=True, patterns=("x", "z"), duplicates=True))
    nothing = {"changed": 0, "dropped": 0}
    assert cleaned.counts() == dict.fromkeys(("white_space", "patterns", "duplicates"), nothing)
