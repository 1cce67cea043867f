"""What is read to score a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents import cache as token_cache
from phi3_lora.data.documents.batch import documents_digest
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.store import DocumentStore, document_lengths, num_loss_tokens
from phi3_lora.errors import ConfigError, DataError
from phi3_lora.inference.scoring_data import ToScore, load_to_score
from tests.tiny import chat, write_rows

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [
        chat("q", "first"),
        {},
        {"messages": [*chat("q", "b")["messages"], *chat("r", "cc")["messages"]]},
        chat("q", "a" * 90),
        chat("q", "last"),
    ]
    return str(write_rows(tmp_path / "d.jsonl", rows))


def load(
    data: str, tokenizer: ChatTokenizer, said: list[str] | None = None, **more: Any
) -> ToScore:
    said = [] if said is None else said
    kept = ("limit", "with_conversations")
    options = {name: value for name, value in more.items() if name not in kept}
    encoding = Encoding(**{"max_length": 40, "context": 60, "on_bad_row": "skip", **options})
    rest = {name: more[name] for name in kept if name in more}
    return load_to_score(data, tokenizer, encoding, note=said.append, **rest)


def lines(found: ToScore) -> list[int]:
    return [int(d.source.rpartition(":")[2]) for d in found.dataset.documents]


@pytest.mark.parametrize("is_answered", [False, True])
@pytest.mark.parametrize(
    ("loss_on", "num_answers", "phrase"),
    [
        ("assistant", len("firstbcclast") + 4, None),
        ("last", len("firstcclast") + 3, "the loss counts on the last answer of each row"),
        ("all", None, "the loss counts on every token of each row but the first"),
    ],
)
def test_the_loss_counts_on_what_was_asked_for_and_says_so(
    tokenizer: ChatTokenizer,
    data: str,
    loss_on: str,
    num_answers: int | None,
    phrase: str | None,
    is_answered: bool,
) -> None:
    said: list[str] = []
    options = {"loss_on": loss_on, "with_conversations": is_answered}
    dataset = load(data, tokenizer, said, **options).dataset
    num_tokens = int(document_lengths(dataset.documents).sum())
    expected = num_tokens - len(dataset.documents) if num_answers is None else num_answers
    assert num_loss_tokens(dataset.documents) == expected
    assert [text for text in said if text.startswith("the loss")] == ([phrase] if phrase else [])


def test_large_data_is_scored_from_the_cache_of_tokens(
    tokenizer: ChatTokenizer, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: list[str] = []
    expected = load(data, tokenizer, plain)
    monkeypatch.setattr(token_cache, "CACHE_FROM_BYTES", 0)
    said: list[str] = []
    found = load(data, tokenizer, said)
    assert isinstance(found.dataset.documents, DocumentStore) and lines(found) == [1, 3, 5]
    assert documents_digest(found.dataset.documents) == documents_digest(expected.dataset.documents)
    assert said[0].startswith("tokenising") and said[1:] == plain
    assert plain[0].startswith(f"skipped 1 bad row(s) of 5 in {data}")
    assert f"{data}: dropped 1 of 4 rows longer than max_length 40 tokens" in plain[1]


def test_the_first_rows_are_scored_and_all_bad_rows_told(
    tokenizer: ChatTokenizer, data: str
) -> None:
    said: list[str] = []
    found = load(data, tokenizer, said, limit=2)
    assert lines(found) == [1, 3] and found.conversations == []
    assert said[0].startswith("skipped 1 bad row(s) of 5")
    with pytest.raises(DataError, match=f"{data}:2: "):
        load(data, tokenizer, limit=1, on_bad_row="error")


def test_conversations_are_those_that_have_a_document(tokenizer: ChatTokenizer, data: str) -> None:
    found = load(data, tokenizer, with_conversations=True)
    assert [row.source for row in found.conversations] == [f"{data}:{i}" for i in (1, 3, 5)]
    assert [d.source for d in found.dataset.documents] == [r.source for r in found.conversations]


@pytest.mark.parametrize("name", ["loss_on", "on_bad_row"])
def test_a_setting_that_is_none_says_what_is_allowed(
    tokenizer: ChatTokenizer, data: str, name: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must be one of .*; got 'user'"):
        load(data, tokenizer, **{name: "user"})
