"""Custom chat templates: usable ones, and the errors for templates that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.errors import ConfigError, DataError, ModelError
from tests.tiny import MARKERS, TEMPLATE, write_tokenizer

END = "<|end|>"
QUESTION_AND_ANSWER = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Question: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Answer: ' + m['content'] + eos_token + '\n' }}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ '<|system|>' + tools | tojson + '<|end|>' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<|system|>' + m['content'] + '<|end|>' }}{% elif m['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '<call>' + c | tojson + '</call>' }}{% endfor %}"
    "{{ '<|end|>' }}{% else %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def talk(*turns: str) -> tuple[dict[str, Any], ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))


def with_file(folder: Path, template: str) -> ChatTokenizer:
    write_tokenizer(folder)
    path = folder / "own.jinja"
    path.write_text(template)
    return ChatTokenizer(folder, vocab_size=264, template_file=path)


def encode(tokenizer: ChatTokenizer, messages: tuple[dict[str, Any], ...]) -> Document:
    return tokenizer.encode_conversations([Conversation(messages, "x:1")])[0]


def learnt(tokenizer: ChatTokenizer, document: Document) -> str:
    ids = document.tokens[document.supervised].tolist()
    return tokenizer.decode(ids, skip_special_tokens=False)


def with_merges(folder: Path, *, like_llama: bool) -> None:
    """Write a tokenizer like Phi-4's or Phi-3's with tokens that cross borders."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=like_llama))
    if like_llama:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    texts = ["Question: a b\nAnswer: c d", "Answer: yes", "Answer:  no\n\nQuestion: "] * 20
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in MARKERS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": MARKERS[0]}))
    (folder / "chat_template.jinja").write_text(QUESTION_AND_ANSWER)


@pytest.mark.parametrize("like_llama", [True, False])
@pytest.mark.parametrize("answer", ["yes", "c d", " no", "\n\nd"])
def test_an_answer_shares_no_token_with_a_header_that_ends_in_text(
    tmp_path: Path, like_llama: bool, answer: str
) -> None:
    with_merges(tmp_path, like_llama=like_llama)
    tokenizer = ChatTokenizer(tmp_path, vocab_size=1000)
    messages = talk("a b", "c", "a", answer)
    tokens = encode(tokenizer, messages).tokens.tolist()
    prompt = tokenizer.encode_prompt(messages[:-1])
    assert tokens[: len(prompt)] == prompt
    own = encode(tokenizer, messages)
    last = own.tokens[len(prompt) :][own.supervised[len(prompt) :]].tolist()
    assert tokenizer.decode(last, skip_special_tokens=False) == answer + MARKERS[0]
    # Without a border the tokenizer joins the header's space to the answer.
    whole = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(
        tokenizer.template.render(messages), add_special_tokens=False
    )
    assert answer != "yes" or whole.ids != tokens


def test_a_template_file_takes_the_place_of_the_models(tmp_path: Path) -> None:
    tokenizer = with_file(tmp_path, QUESTION_AND_ANSWER)
    document = encode(tokenizer, talk("a", "b", "c", "d"))
    text = tokenizer.decode(document.tokens.tolist(), skip_special_tokens=False)
    eos = MARKERS[0]
    assert text == f"Question: a\nAnswer: b{eos}\nQuestion: c\nAnswer: d{eos}\n"
    assert learnt(tokenizer, document) == f"b{eos}d{eos}"
    assert tokenizer.notes == [] and tokenizer.end_of_turn_id == 256


def test_a_template_file_serves_a_model_without_a_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": MARKERS[0]}))
    with pytest.raises(ModelError, match=r"give one with data\.chat_template"):
        ChatTokenizer(tmp_path, vocab_size=264)
    path = tmp_path / "own.jinja"
    path.write_text(TEMPLATE)
    tokenizer = ChatTokenizer(tmp_path, vocab_size=264, template_file=path)
    assert learnt(tokenizer, encode(tokenizer, talk("a", "b"))) == f"b{END}"


@pytest.mark.parametrize(
    ("old", "new", "phrase"),
    [
        ("message['content'] +", "message['content'] | upper +", "changes the text of message 1"),
        ("message['content'] +", "message['content'] * 2 +", "writes message 1 2 times"),
        ("message['role'] == 'assistant'", "false", r"leaves out message 2 \(assistant\)"),
        ("message['role'] == 'user'", "false", r"leaves out message 1 \(user\)"),
        ("in messages", "in messages | reverse", "changes the order of the messages"),
        ("{% for", "{{ raise_exception('not today') }}{% for", "refuses .*: not today"),
        ("message['content'] +", "message.content.body.text +", "refuses the conversation"),
        ("{% for", "{% fro", "is not valid jinja2"),
    ],
)
def test_a_template_file_that_cannot_be_followed_says_why(
    tmp_path: Path, old: str, new: str, phrase: str
) -> None:
    with pytest.raises(ConfigError, match=rf"data\.chat_template: .*own\.jinja.*{phrase}"):
        with_file(tmp_path, TEMPLATE.replace(old, new))


def test_a_missing_or_unreadable_template_file_is_a_setting_error(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.chat_template: no such file"):
        ChatTokenizer(tmp_path, vocab_size=264, template_file=tmp_path / "none.jinja")
    (tmp_path / "latin.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ConfigError, match=r"latin\.jinja cannot be read"):
        ChatTokenizer(tmp_path, vocab_size=264, template_file=tmp_path / "latin.jinja")


@pytest.mark.parametrize(
    ("filter_", "kept"), [("trim", "a b"), ("trim | string", "a b")], ids=["trim", "chain"]
)
def test_white_space_that_a_template_trims_is_counted(
    tmp_path: Path, filter_: str, kept: str
) -> None:
    tokenizer = with_file(
        tmp_path, TEMPLATE.replace("message['content'] +", f"message['content'] | {filter_} +")
    )
    document = encode(tokenizer, talk("  q ", "  a b  "))
    assert learnt(tokenizer, document) == f"{kept}{END}"
    assert document.remarks.num_stripped == 7


def test_a_row_that_a_template_rewrites_only_sometimes_is_named(tmp_path: Path) -> None:
    # Templates of reasoning models remove the thoughts of earlier turns in this way.
    template = TEMPLATE.replace(
        "message['content'] +", "message['content'].split('</think>')[-1] +"
    )
    tokenizer = with_file(tmp_path, template)
    rows = [Conversation(talk("q", a), f"f:{i}") for i, a in enumerate(["x", "<think>y</think>z"])]
    documents, problems = tokenizer.encode_rows(rows)
    assert documents[0] is not None and documents[1] is None
    assert problems == [
        "f:1: the chat template changes the text of message 2: cannot place the loss"
    ]


@pytest.mark.parametrize(
    ("old", "new", "phrase"),
    [
        ("message['content'] + '<|end|>\n'", "message['content'] + '</s>\n'", "where to stop"),
        ("{{ '<|assistant|>\n' }}", "{{ '<|assistant|>\n<think>' }}", "add_generation_prompt"),
    ],
)
def test_each_fault_of_a_template_is_noted(tmp_path: Path, old: str, new: str, phrase: str) -> None:
    template = TEMPLATE.replace("{% else %}{{ eos_token }}", "").replace(old, new)
    (note,) = with_file(tmp_path, template).notes
    assert phrase in note


def test_a_token_that_the_template_writes_is_text_in_a_message(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][-1], "id": 261, "content": "<|tool|>"})
    raw["added_tokens"][-1]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    path = tmp_path / "own.jinja"
    path.write_text("{{ '<|tool|>' }}" + TEMPLATE)
    tokenizer = ChatTokenizer(tmp_path, vocab_size=264, template_file=path)
    document = encode(tokenizer, talk("a <|tool|> b", "c"))
    assert document.tokens.tolist().count(261) == 1
    assert document.remarks.has_marker_text


CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = (
    {"role": "user", "content": "Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
)


@pytest.mark.parametrize("content", ["", "Let me see."])
def test_a_call_of_a_tool_is_learnt_with_its_turn(tmp_path: Path, content: str) -> None:
    tokenizer = with_file(tmp_path, WITH_TOOLS)
    messages = (CALLING[0], {**CALLING[1], "content": content}, *CALLING[2:])
    call = f"<call>{json.dumps(CALL)}</call>"
    document = encode(tokenizer, messages)
    assert learnt(tokenizer, document) == f"{content}{call}{END}It rains.{END}"


def test_tools_are_passed_to_templates_that_ask_for_them(tmp_path: Path) -> None:
    tokenizer = with_file(tmp_path, WITH_TOOLS)
    tools = json.dumps([{"name": "weather"}])
    messages = ({"role": "system", "content": "", "tools": tools}, *CALLING)
    text = tokenizer.decode(encode(tokenizer, messages).tokens.tolist(), skip_special_tokens=False)
    assert text.startswith(f"<|system|>{tools}<|end|>")


@pytest.mark.parametrize(
    ("change", "template", "phrase"),
    [
        ({}, TEMPLATE.replace("== 'user'", "in ['user', 'tool']"), "leaves out the tool_calls of"),
        ({"tool_calls": [{"name": END}]}, WITH_TOOLS, "hold the text of a special token"),
        ({}, WITH_TOOLS.replace("{{ '<|end|>' }}", ""), "where the chat template's text of the"),
    ],
    ids=["left out", "marker", "no end"],
)
def test_a_call_that_cannot_be_written_is_a_bad_row(
    tmp_path: Path, change: dict[str, Any], template: str, phrase: str
) -> None:
    tokenizer = with_file(tmp_path, template)
    messages = (CALLING[0], {**CALLING[1], **change}, *CALLING[2:])
    with pytest.raises(DataError, match=f"x:1: .*{phrase}"):
        encode(tokenizer, messages)
