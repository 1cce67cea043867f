from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_lora.data.rows.conversation import EMPTY, Conversation, RowError
from phi3_lora.data.rows.formats import COLUMNS, FORMATS, RowReader

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def read(row: Any, name: str = "auto", **columns: str) -> Conversation:
    return RowReader(name, columns).read(row, "f:1")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, (SYSTEM, USER, ANSWER)),
        (
            {"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]},
            (SYSTEM, USER, ANSWER),
        ),
        ({"messages": json.dumps([USER, ANSWER])}, (USER, ANSWER)),
        (
            {"messages": [{**USER, "name": None, "tool_calls": None}, ANSWER], "tools": None},
            (USER, ANSWER),
        ),
        (
            {"messages": [{**USER, "content": [{"type": "text", "text": "q"}]}, ANSWER]},
            (USER, ANSWER),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            (USER, ANSWER),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "user", "value": "q"},
                    {"from": "chatgpt", "value": "a"},
                ]
            },
            (SYSTEM, USER, ANSWER),
        ),
        ({"conversations": [USER, ANSWER], "system": "s"}, (SYSTEM, USER, ANSWER)),
        ({"prompt": "q", "completion": "a"}, (USER, ANSWER)),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, (SYSTEM, USER, ANSWER)),
        ({"prompt": [USER], "completion": "a"}, (USER, ANSWER)),
        ({"prompt": "q", "completion": [ANSWER], "system": "s"}, (SYSTEM, USER, ANSWER)),
        ({"instruction": "q", "output": "a"}, (USER, ANSWER)),
        ({"instruction": "q", "input": "", "output": "a", "history": []}, (USER, ANSWER)),
        (
            {"instruction": "q", "input": "x", "output": "a", "system": "s"},
            (SYSTEM, {**USER, "content": "q\nx"}, ANSWER),
        ),
        (
            {"instruction": "q2", "output": "a2", "history": [["q", "a"]]},
            (USER, ANSWER, {**USER, "content": "q2"}, {**ANSWER, "content": "a2"}),
        ),
        ({"text": "q", "label": "a"}, (USER, ANSWER)),
        ({"text": "q", "label": 3}, (USER, {**ANSWER, "content": "3"})),
        ({"text": "q", "label": True}, (USER, {**ANSWER, "content": "true"})),
    ],
)
def test_row_is_the_conversation_it_means(row: Any, expected: tuple[Any, ...]) -> None:
    found = read(row)
    assert found.messages == expected
    assert (found.source, found.weights, found.whole) == ("f:1", None, False)


def test_plain_text_is_wholly_in_the_loss() -> None:
    found = read({"text": "Once upon a time."})
    assert found.whole and found.messages == (
        {"role": "assistant", "content": "Once upon a time."},
    )


def test_parts_of_text_are_put_together() -> None:
    parts = [{"type": "text", "text": "Two "}, {"type": "text", "text": "cups."}]
    assert read({"messages": [USER, {**ANSWER, "content": parts}]}).messages[1]["content"] == (
        "Two cups."
    )


def test_weights_of_turns_are_kept_and_the_rest_is_left_to_the_settings() -> None:
    turns = [SYSTEM, USER, {**ANSWER, "weight": 0}, {**USER, "weight": 1}, {**ANSWER, "weight": 1}]
    found = read({"messages": turns})
    assert found.weights == (None, None, False, True, True)
    assert all("weight" not in message for message in found.messages)


def test_answers_within_a_prompt_are_not_in_the_loss() -> None:
    found = read({"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "system": "s"})
    assert found.weights == (None, None, False, None, None)


def test_tools_go_into_the_system_message_and_calls_stay_in_their_turn() -> None:
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "name": "add", "tool_call_id": "1"},
        ANSWER,
    ]
    found = read({"messages": turns, "tools": [TOOL]}).messages
    assert found == read({"messages": turns, "tools": json.dumps([TOOL])}).messages
    assert found[0] == {"role": "system", "content": "", "tools": json.dumps([TOOL])}
    assert found[2] == {"role": "assistant", "tool_calls": [CALL], "content": ""}
    assert found[3] == {"role": "tool", "content": "3", "name": "add", "tool_call_id": "1"}


def test_call_of_sharegpt_is_a_call_of_messages() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "a"},
    ]
    found = read({"conversations": turns}).messages
    assert found[1]["tool_calls"] == [CALL]
    assert [m["role"] for m in found] == ["user", "assistant", "tool", "assistant"]


CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3"}


@pytest.mark.parametrize(
    ("row", "phrase"),
    [
        ({"messages": [USER, {**ANSWER, "content": 3}]}, "message 2 (assistant): content must be"),
        ({"messages": [USER, {**ANSWER, "content": {}}]}, "list of text parts, got dict"),
        ({"messages": [USER, {**ANSWER, "content": None}]}, "list of text parts, got null"),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
            "message 1 (user): content part 1 is of type 'image_url'; only text is trained",
        ),
        ({"messages": [{**USER, "content": [[[[]]]]}, ANSWER]}, "content part 1 is of type 'list'"),
        ({"messages": [{**USER, "content": [{"type": "text"}]}, ANSWER]}, "`text` of content part"),
        ({"messages": "[1"}, "`messages` is not JSON"),
        ({"messages": "hello"}, "`messages` must be a list"),
        ({"messages": [USER, ANSWER, RESULT]}, "must follow an assistant's tool_calls"),
        ({"messages": [USER, CALLING, USER]}, "a tool call must be followed by tool"),
        ({"messages": [USER, CALLING, RESULT]}, "ends with a tool message"),
        (
            {"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]},
            "only the assistant has tool_calls",
        ),
        ({"messages": [USER, {**CALLING, "tool_calls": {"a": 1}}]}, "must be a list of objects"),
        ({"messages": [USER, {**CALLING, "tool_calls": [{"id": "1"}]}]}, "with `function`"),
        ({"messages": [USER, ANSWER], "tools": "[{"}, "`tools` is not JSON"),
        ({"messages": [USER, ANSWER], "tools": ["add"]}, "`tools` must be a list of objects"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "t"}, "a system message and `system`"),
        ({"messages": [USER, ANSWER], "system": 3}, "`system` must be a string, got int"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "message 2: weight must be 0 or 1"),
        ({"messages": [USER, {**ANSWER, "weight": "no"}]}, "weight must be 0 or 1, got 'no'"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "roles must alternate, user first"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "role 'alien' is not one of"),
        (
            {"conversations": [USER, {"from": "function_call", "value": "add(1)"}]},
            "a function_call must hold JSON",
        ),
        ({"prompt": [], "completion": []}, "must be a list with at least one message"),
        ({"prompt": None, "completion": "a"}, "needs `messages`"),
        ({"prompt": {"a": 1}, "completion": "a"}, "message 1 (user): content must be"),
        ({"instruction": "q", "input": 3, "output": "a"}, "`input` must be a string, got int"),
        ({"instruction": "q", "output": ""}, "the assistant's answer is empty"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "entry 1 must be a pair"),
        ({"text": 3}, "`text` must be a string, got int"),
        ({"text": " \n"}, "`text` is empty"),
        ({"text": "\ud83d"}, "holds half a surrogate pair"),
        ({"text": "q", "label": float("nan")}, "`label` must be a string or a number, got nan"),
        ({"text": "q", "label": []}, "`label` must be a string or a number, got []"),
    ],
)
def test_bad_row_says_why(row: Any, phrase: str) -> None:
    with pytest.raises(RowError) as problem:
        read(row)
    assert phrase in str(problem.value)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [USER, {**ANSWER, "content": None}]}, "empty"),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, "empty"),
        ({"messages": [USER, {**ANSWER, "content": 3}]}, "bad-row"),
        ({"prompt": "q", "completion": None}, "empty"),
        ({"prompt": "q", "completion": ""}, "empty"),
        ({"prompt": "q", "input": None}, "bad-row"),
        ({"prompt": "q"}, "bad-row"),
        ({"text": ""}, "empty"),
        ({"text": "q", "label": " "}, "empty"),
        ({"text": "q", "label": float("nan")}, "empty"),
        ({"text": "q", "label": []}, "bad-row"),
        ({"messages": [{**USER, "content": "\udc00"}, ANSWER]}, "encoding"),
        ({"messages": [USER]}, "bad-row"),
    ],
)
def test_bad_row_has_a_kind(row: Any, kind: str) -> None:
    with pytest.raises(RowError) as problem:
        read(row)
    assert problem.value.kind == kind


def test_a_null_under_another_name_is_empty_too() -> None:
    with pytest.raises(RowError) as problem:
        read({"prompt": "q", "reply": None}, completion="reply")
    assert problem.value.kind == "empty"


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"completion": "chosen"}),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, {"completion": "chosen"}),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, {"messages": "chosen"}),
    ],
)
def test_preference_data_is_refused_and_the_way_out_works(
    row: Any, columns: dict[str, str]
) -> None:
    with pytest.raises(RowError, match="is preference data") as problem:
        read(row)
    (name,) = columns
    assert f"data.columns to {{{name}: chosen}}" in str(problem.value)
    assert read(row, **columns).messages == (USER, ANSWER)


@pytest.mark.parametrize("label", [True, False, "True", "0", 1])
def test_judged_completions_are_refused(label: Any) -> None:
    with pytest.raises(RowError, match="as KTO takes it"):
        read({"prompt": "q", "completion": "a", "label": label})


def test_columns_take_the_place_of_our_names() -> None:
    row = {"question": "q", "answer": "a", "prompt": "other", "completion": "other"}
    assert read(row, prompt="question", completion="answer").messages == (USER, ANSWER)


def test_missing_column_is_named_but_an_optional_one_may_miss() -> None:
    with pytest.raises(RowError, match=r"has no column question \(data.columns\); its keys: q"):
        read({"q": "q"}, prompt="question")
    row = {"instruction": "q", "output": "a"}
    assert read(row, input="context").messages == (USER, ANSWER)


def test_format_can_be_given() -> None:
    row = {"text": "q", "label": "a"}
    assert read(row, "text").whole
    with pytest.raises(RowError, match="is not alpaca: `instruction`, `output` missing or null"):
        read(row, "alpaca")


def test_first_usable_row_decides_the_format_of_a_file() -> None:
    reader = RowReader()
    with pytest.raises(RowError):
        reader.read({}, "f:1")
    assert not reader.read({"text": "q", "label": "a"}, "f:2").whole
    with pytest.raises(RowError, match="`label` is missing or empty; the file is classification"):
        reader.read({"text": "q"}, "f:3")
    with pytest.raises(
        RowError, match="is prompt-completion, but the file is classification because of f:2"
    ):
        reader.read({"prompt": "q", "completion": "a"}, "f:4")


def test_formats_of_conversations_may_be_mixed() -> None:
    reader = RowReader()
    rows: list[Any] = [
        {"messages": [USER, ANSWER]},
        {"prompt": "q", "completion": "a"},
        {"conversations": [USER, ANSWER]},
    ]
    assert [reader.read(row, "f").messages for row in rows] == [(USER, ANSWER)] * 3


def test_what_a_row_has_many_of_is_counted_in_messages() -> None:
    with pytest.raises(RowError, match=r"its keys: k0, .* and 988 more; rename"):
        read({f"k{i}": 1 for i in range(1000)})
    with pytest.raises(RowError, match=r"got user user .* and 988 more$"):
        read({"messages": [USER] * 1000})


def test_plain_text_names_what_is_not_read() -> None:
    reader = RowReader()
    reader.read({"text": "x", "category": "y"}, "f:1")
    assert reader.notes() == ["rows of plain text: every token is in the loss; not read: category"]


HOSTILE = st.sampled_from(["\x1b[2J\nerror: all is well", "x" * 1000, "\u202e", "\ud800"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | HOSTILE
KEYS = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "tool_calls", "function", "name", "weight"]
)
WORDS = st.sampled_from(
    ["user", "assistant", "system", "tool", "gpt", "function_call", "text", "[]"]
)
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)
NAMES = st.sampled_from([*COLUMNS, "chosen", "rejected"]) | HOSTILE
ROW = st.dictionaries(NAMES, VALUES, max_size=4)


def check_read(row: Any, name: str = "auto") -> None:
    try:
        found = read(row, name)
    except RowError as problem:
        # A message is one printable line, however long or strange the row is.
        assert str(problem).isprintable() and 0 < len(str(problem)) < 500
        return
    assert any(m["role"] == "assistant" for m in found.messages)
    assert all(isinstance(m["content"], str) for m in found.messages)
    assert found.weights is None or len(found.weights) == len(found.messages)


@given(ROW, st.sampled_from(["auto", *FORMATS]))
def test_any_row_is_a_conversation_or_says_why_not(row: Any, name: str) -> None:
    check_read(row, name)


TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool", "gpt"]) | HOSTILE,
        "content": VALUES,
    },
    optional={"tool_calls": VALUES, "weight": VALUES},
)


@given(st.fixed_dictionaries({"messages": st.lists(TURN)}, optional={"tools": VALUES}))
def test_any_turns_are_a_conversation_or_say_why_not(row: Any) -> None:
    check_read(row)


@pytest.mark.parametrize(
    ("first", "row", "missing"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "c"}, "completion"),
        ({"prompt": "a", "completion": "b"}, {"completion": "c"}, "prompt"),
        ({"text": "a", "label": "b"}, {"text": "c"}, "label"),
        ({"text": "a", "label": "b"}, {"label": "c"}, "text"),
        ({"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d"}, "output"),
    ],
)
def test_a_row_that_lacks_a_value_of_its_files_format_says_which(
    first: Any, row: Any, missing: str
) -> None:
    reader = RowReader("auto", {})
    reader.read(first, "f:1")
    with pytest.raises(RowError) as problem:
        reader.read(row, "f:2")
    assert str(problem.value).startswith(f"`{missing}` is missing or empty; the file is ")
    assert problem.value.kind == EMPTY
