"""The published chat templates of the family, on a tokenizer of bytes.

Source: tokenizer_config.json of each model on the hub; the reasoning model's system prompt is
shortened.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.rows.conversation import Conversation
from tests.tiny import MARKERS, TEMPLATE, write_tokenizer


class Published(NamedTuple):
    """A template, its end of turn, and its text of a short conversation."""

    template: str
    end: str
    rendered: str
    """Text of user a, assistant b, user c, assistant d."""


PHI4_MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")
_PHI3_TURNS = (
    "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\nd<|end|>\n"
)
_PHI4_TURNS = (
    "<|im_start|>user<|im_sep|>a<|im_end|><|im_start|>assistant<|im_sep|>b<|im_end|>"
    "<|im_start|>user<|im_sep|>c<|im_end|><|im_start|>assistant<|im_sep|>d<|im_end|>"
)
_PHI4_BODY = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>' +"
    " message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
TEMPLATES = {
    "Phi-3-mini-4k, first release": Published(
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
        "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
        "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}"
        "{% endif %}{% endfor %}",
        "<|end|>",
        "<|endoftext|>" + _PHI3_TURNS,
    ),
    "Phi-3-mini-4k": Published(
        TEMPLATE.replace(" and message['content'] %}", " %}"),
        "<|end|>",
        _PHI3_TURNS + "<|endoftext|>",
    ),
    "Phi-3.5-mini": Published(TEMPLATE, "<|end|>", _PHI3_TURNS + "<|endoftext|>"),
    "Phi-4-mini": Published(
        "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
        "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + "
        "'<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + "
        "message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
        _PHI3_TURNS.replace("\n", "") + "<|endoftext|>",
    ),
    "Phi-4": Published(_PHI4_BODY, "<|im_end|>", _PHI4_TURNS),
    "Phi-4-reasoning": Published(
        "{% if messages|length == 0 or messages[0]['role'] != 'system' %}"
        "{{'<|im_start|>system<|im_sep|>You are Phi.<|im_end|>'}}{% endif %}" + _PHI4_BODY,
        "<|im_end|>",
        "<|im_start|>system<|im_sep|>You are Phi.<|im_end|>" + _PHI4_TURNS,
    ),
}


@pytest.fixture(params=["eats space", "keeps space"])
def eats_space(request: pytest.FixtureRequest) -> bool:
    return request.param == "eats space"


@pytest.fixture(params=TEMPLATES)
def published(request: pytest.FixtureRequest) -> Published:
    return TEMPLATES[request.param]


@pytest.fixture
def tokenizer(published: Published, eats_space: bool, tmp_path: Path) -> ChatTokenizer:
    markers = PHI4_MARKERS if "im_sep" in published.template else MARKERS
    write_tokenizer(tmp_path, markers, published.template, eats_space=eats_space)
    return ChatTokenizer(tmp_path, vocab_size=264)


def talk(*turns: str) -> tuple[dict[str, str], ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))


def test_the_text_is_the_templates_own(tokenizer: ChatTokenizer, published: Published) -> None:
    assert tokenizer.template.render(talk("a", "b", "c", "d")) == published.rendered


@pytest.mark.parametrize(
    "messages",
    [
        talk("a", "b", "c", "d"),
        talk("say <|im_end|> and <|end|>", "It is <|im_sep|>, not <|assistant|>."),
        ({"role": "system", "content": "Be brief."}, *talk("größe 🦊", "naïve\n\nline")),
    ],
    ids=["plain", "markers", "system"],
)
def test_every_answer_and_its_end_are_learnt_and_nothing_else(
    tokenizer: ChatTokenizer, published: Published, messages: tuple[dict[str, str], ...]
) -> None:
    (document,) = tokenizer.encode_conversations([Conversation(messages, "x:1")])
    ids = document.tokens[document.supervised].tolist()
    answers = [m["content"] + published.end for m in messages if m["role"] == "assistant"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(answers)
    assert ids.count(tokenizer.end_of_turn_id) == len(answers)


def test_a_prompt_is_the_start_of_the_training_ids_and_the_end_of_turn_stops(
    tokenizer: ChatTokenizer, published: Published
) -> None:
    messages = talk("a", "b", "c", "d")
    (document,) = tokenizer.encode_conversations([Conversation(messages, "x:1")])
    prompt = tokenizer.encode_prompt(messages[:-1])
    expected = [*prompt, *tokenizer.encode_text("d"), tokenizer.end_of_turn_id]
    assert document.tokens[: len(expected)].tolist() == expected
    assert tokenizer.decode([expected[-1]], skip_special_tokens=False) == published.end
