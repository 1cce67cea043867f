from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.errors import DataError, ModelError
from tests.tiny import MARKERS, TEMPLATE, write_tokenizer

IDS = {marker: 256 + i for i, marker in enumerate(MARKERS)}
END = "<|end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return ChatTokenizer(folder, vocab_size=264)


def talk(*turns: str, system: str | None = None) -> tuple[dict[str, str], ...]:
    roles = ("user", "assistant")
    spoken = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return tuple(([{"role": "system", "content": system}] if system is not None else []) + spoken)


def encode(tokenizer: ChatTokenizer, messages: tuple[dict[str, str], ...]) -> Document:
    return tokenizer.encode_conversations([Conversation(messages, "x:1")])[0]


def learnt(tokenizer: ChatTokenizer, document: Document) -> str:
    ids = document.tokens[document.supervised].tolist()
    return tokenizer.decode(ids, skip_special_tokens=False)


PLAIN = [
    talk("What?", "This."),
    talk("one", "1", "two", "2", "three", "3"),
    talk("hi", "ho", system="Be short."),
    talk("hi", "ho", system=""),
    talk("größe?", "naïve 日本語 🦊 e\u0301", "שלום", "ок"),
    talk("line\n\nline\n", "a\n  b\n"),
    talk("a < b | c > d", "<|end"),
    talk("", "to nothing"),
]
MARKED = [
    talk(f"say {END} and <|assistant|>\nnow", "No."),
    talk("<|endoftext|>", "x", "<|user|>", "y"),
    talk("hi", "ho", system="<|system|> <|end|>"),
    talk("quote it", f"It is {END} here"),
    talk("quote it", END),
]


@pytest.mark.parametrize("messages", PLAIN + MARKED)
def test_answers_and_their_end_are_learnt(
    tokenizer: ChatTokenizer, messages: tuple[dict[str, str], ...]
) -> None:
    answers = [m["content"] + END for m in messages if m["role"] == "assistant"]
    assert learnt(tokenizer, encode(tokenizer, messages)) == "".join(answers)


@pytest.mark.parametrize("messages", MARKED)
def test_marker_inside_a_text_is_plain_text(
    tokenizer: ChatTokenizer, messages: tuple[dict[str, str], ...]
) -> None:
    tokens = encode(tokenizer, messages).tokens.tolist()
    for role in ("user", "assistant", "system"):
        assert tokens.count(IDS[f"<|{role}|>"]) == sum(m["role"] == role for m in messages)
    assert tokens.count(IDS[END]) == len(messages)
    assert tokens.count(IDS["<|endoftext|>"]) == 1


def test_marker_inside_a_text_does_not_shift_the_mask(tokenizer: ChatTokenizer) -> None:
    marked = encode(tokenizer, talk(f"say {END} now", "No."))
    other = encode(tokenizer, talk("say ??????? now", "No."))
    np.testing.assert_array_equal(marked.supervised, other.supervised)


@pytest.mark.parametrize("messages", PLAIN)
def test_encoding_by_segment_equals_whole_text(
    tokenizer: ChatTokenizer, messages: tuple[dict[str, str], ...]
) -> None:
    rendered = tokenizer._renderer.conversation(Conversation(messages, "x:1"))
    assert not rendered.remarks.has_marker_text and not rendered.borders
    whole, pieces = tokenizer._encode(rendered), tokenizer._encode_in_parts(rendered)
    assert pieces[0] == list(whole[0])
    documents = [tokenizer._document(found, rendered, "x:1") for found in (whole, pieces)]
    np.testing.assert_array_equal(documents[0].supervised, documents[1].supervised)


@pytest.mark.parametrize("messages", PLAIN + MARKED)
def test_prompt_and_answer_are_a_prefix_of_the_training_ids(
    tokenizer: ChatTokenizer, messages: tuple[dict[str, str], ...]
) -> None:
    prompt = tokenizer.encode_prompt(messages[:-1])
    answer = tokenizer.encode_text(messages[-1]["content"])
    expected = [*prompt, *answer, tokenizer.end_of_turn_id]
    assert encode(tokenizer, messages).tokens[: len(expected)].tolist() == expected


@pytest.mark.parametrize("question", ["q", f"q {END} "])
@pytest.mark.parametrize("space", ["  ", "\n\n", "\t", "\u3000", "\x85"])
def test_marker_eats_the_space_before_an_answer(
    tokenizer: ChatTokenizer, space: str, question: str
) -> None:
    document = encode(tokenizer, talk(question, f"{space}a"))
    assert learnt(tokenizer, document) == f"a{END}"


def test_end_of_turn_is_the_templates(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.end_of_turn_id == IDS[END]


def test_first_token_never_counts() -> None:
    document = Document(np.arange(3, dtype=np.int32), np.array([True, True, False]), "x:1")
    assert document.loss_tokens == 1


def test_a_batch_equals_its_rows(tokenizer: ChatTokenizer) -> None:
    rows = [Conversation(m, f"x:{i}") for i, m in enumerate(PLAIN + MARKED)]
    for found, row in zip(tokenizer.encode_conversations(rows), rows, strict=True):
        alone = encode(tokenizer, row.messages)
        assert found.source == row.source
        np.testing.assert_array_equal(found.tokens, alone.tokens)
        np.testing.assert_array_equal(found.supervised, alone.supervised)


def with_template(folder: Path, template: Any, **changes: Any) -> ChatTokenizer:
    write_tokenizer(folder)
    config = {"eos_token": MARKERS[0], "chat_template": template, **changes}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ChatTokenizer(folder, vocab_size=264)


def test_generation_block_changes_nothing(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    old = "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    new = (
        "{{'<|assistant|>\n'}}{% generation %}{{message['content'] + '<|end|>'}}"
        "{% endgeneration %}{{'\n'}}"
    )
    assert old in TEMPLATE
    marked = with_template(tmp_path, TEMPLATE.replace(old, new))
    for messages in PLAIN + MARKED:
        expected, found = encode(tokenizer, messages), encode(marked, messages)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.supervised, expected.supervised)


def test_template_that_trims_is_followed(tmp_path: Path) -> None:
    trimming = with_template(
        tmp_path, TEMPLATE.replace("message['content'] +", "message['content'] | trim +")
    )
    document = encode(trimming, talk("  q  ", "  a b  "))
    assert learnt(trimming, document) == f"a b{END}"


def test_template_file_and_list_of_templates_are_read(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": MARKERS[0]}))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert ChatTokenizer(tmp_path, vocab_size=264).end_of_turn_id == IDS[END]
    folder = tmp_path / "list"
    folder.mkdir()
    listed = [{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    eos = {"content": MARKERS[0], "special": True}
    assert with_template(folder, listed, eos_token=eos).end_of_turn_id == IDS[END]


@pytest.mark.parametrize(
    ("template", "phrase"),
    [(None, "has no chat template"), ("{% if %}", "is not valid jinja2")],
)
def test_bad_template_is_a_model_error(tmp_path: Path, template: Any, phrase: str) -> None:
    with pytest.raises(ModelError, match=phrase):
        with_template(tmp_path, template)


@pytest.mark.parametrize(
    ("old", "new", "phrase"),
    [
        ("message['content'] +", "message['content'] | upper +", "changes the text of message"),
        (
            "{% for message in messages %}",
            "{% for message in messages %}{% if message['content'] == 'bad' %}"
            "{{ raise_exception('no bad words') }}{% endif %}",
            "no bad words",
        ),
    ],
)
def test_row_that_the_template_refuses_is_named(
    tmp_path: Path, old: str, new: str, phrase: str
) -> None:
    write_tokenizer(tmp_path)
    tokenizer = ChatTokenizer(tmp_path, vocab_size=264)
    from phi3_lora.data.chat.template import ChatTemplate

    tokenizer._renderer.template = ChatTemplate(
        TEMPLATE.replace(old, new), {"eos_token": MARKERS[0]}
    )
    rows = [Conversation(talk("q", "1"), "f:1"), Conversation(talk("bad", "1"), "f:2")]
    with pytest.raises(DataError) as problem:
        tokenizer.encode_conversations(rows)
    assert "f:2: " in str(problem.value) and phrase in str(problem.value)


def test_template_cannot_reach_python(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="refuses"):
        with_template(tmp_path, "{{ ''.__class__.__mro__[1].__subclasses__() }}" + TEMPLATE)


@pytest.mark.parametrize(
    ("content", "phrase"), [(None, "has no tokenizer.json"), ("<html>", "is damaged")]
)
def test_bad_tokenizer_is_a_model_error(tmp_path: Path, content: str | None, phrase: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=phrase):
        ChatTokenizer(tmp_path, vocab_size=264)


def test_more_ids_than_the_model_has_is_a_model_error(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="the tokenizer has id 260, the model only 260 ids"):
        ChatTokenizer(tmp_path, vocab_size=260)
