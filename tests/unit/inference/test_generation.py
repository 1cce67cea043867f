"""Pieces of answers, whole answers, and characters of several tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.engine.request import Sampling
from phi3_lora.inference.generation import (
    Piece,
    TextStream,
    encode_prompts,
    generate,
    stream,
)
from tests.tiny import write_tokenizer
from tests.unit.toy_engine import ToyEngine

STOP = 1
TEXT = "caf\u00e9 \u4f60\u597d \U0001f600!"


class ScriptedEngine(ToyEngine):
    """An engine that answers prompt i with script i, one token of each in turn."""

    def __init__(self, *scripts: list[int]) -> None:
        super().__init__()
        self._scripts = scripts

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        for place in range(max(map(len, self._scripts))):
            for index, script in enumerate(self._scripts):
                if place < len(script):
                    yield index, script[place]


class SentencePieceStandIn:
    """A decoder like Phi-3's: a space sign, single bytes, and no space at the start of a text."""

    PIECES = ("\u2581a", "\u2581", "b", "\u2581the", "<s>", *(f"<0x{i:02X}>" for i in range(256)))

    def __init__(self) -> None:
        vocab = {piece: i for i, piece in enumerate(self.PIECES)}
        self._tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
        self._tokenizer.add_special_tokens(["<s>"])
        self._tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    write_tokenizer(tmp_path)
    return ChatTokenizer(tmp_path, vocab_size=264)


def pieces_of(tokenizer: ChatTokenizer, script: list[int], limit: int = 99) -> list[Piece]:
    sampling = Sampling(max_new_tokens=limit, stop_ids=frozenset({STOP}))
    return list(stream(ScriptedEngine(script), tokenizer, [[2]], sampling))


def test_characters_that_span_tokens_come_whole(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_text(TEXT)
    assert len(ids) == len(TEXT.encode())
    pieces = pieces_of(tokenizer, [*ids, STOP])
    deltas = [piece.text_delta for piece in pieces if piece.text_delta]
    assert deltas == list(TEXT)
    assert [piece.token_id for piece in pieces] == [*ids, STOP]


@pytest.mark.parametrize("end", ["stop", "length", "context"])
def test_an_incomplete_character_at_the_end_is_not_lost(tokenizer: ChatTokenizer, end: str) -> None:
    ids = tokenizer.encode_text("a\u4f60")[:-1]
    script = [*ids, STOP] if end == "stop" else ids
    pieces = pieces_of(tokenizer, script, limit=len(ids) if end == "length" else 99)
    assert "".join(piece.text_delta for piece in pieces) == tokenizer.decode(ids)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == ("stop" if end == "stop" else "length")
    assert (pieces[-1].token_id is None) == (end == "context")


def test_pieces_of_a_batch_carry_their_prompt(tokenizer: ChatTokenizer) -> None:
    first, second = tokenizer.encode_text("\u00e9x"), tokenizer.encode_text("yz")
    sampling = Sampling(max_new_tokens=3, stop_ids=frozenset({STOP}))
    engine = ScriptedEngine(first, [*second, STOP])
    pieces = list(stream(engine, tokenizer, [[2], [3]], sampling))
    texts = ["".join(p.text_delta for p in pieces if p.index == index) for index in (0, 1)]
    assert texts == ["\u00e9x", "yz"]
    ends = {p.index: p.finish_reason for p in pieces if p.finish_reason is not None}
    assert ends == {0: "length", 1: "stop"}


def test_whole_answers_keep_the_order_of_the_prompts(tokenizer: ChatTokenizer) -> None:
    long, short = tokenizer.encode_text(TEXT), tokenizer.encode_text("x")
    sampling = Sampling(max_new_tokens=99, stop_ids=frozenset({STOP}))
    ended: list[int] = []
    found = generate(
        ScriptedEngine(long, [*short, STOP]),
        tokenizer,
        [[2], [3]],
        sampling,
        lambda piece: ended.append(piece.index) if piece.finish_reason else None,
    )
    assert [(g.text, g.finish_reason) for g in found] == [(TEXT, "length"), ("x", "stop")]
    assert found[1].token_ids == [*short, STOP]
    assert ended == [1, 0]
    assert json.loads(json.dumps(found[1].to_dict())) == {
        "text": "x",
        "token_ids": [*short, STOP],
        "finish_reason": "stop",
    }


def test_a_text_is_encoded_as_a_user_message(tokenizer: ChatTokenizer) -> None:
    message = {"role": "user", "content": "hello"}
    first, second = encode_prompts(tokenizer, ["hello", [message]])
    assert first == second == tokenizer.encode_prompt([message])


@given(st.lists(st.integers(0, 4), max_size=12), st.text(max_size=6))
def test_pieces_join_to_the_text_of_all_tokens(words: list[int], text: str) -> None:
    decoder = SentencePieceStandIn()
    ids = [*words, *(5 + byte for byte in text.encode()), *words]
    texts = TextStream(decoder)  # type: ignore[arg-type]
    assert "".join([*map(texts.add, ids), texts.finish()]) == decoder.decode(ids)


def test_the_work_for_a_token_does_not_grow(tokenizer: ChatTokenizer) -> None:
    texts = TextStream(tokenizer)
    longest = 0
    for token in tokenizer.encode_text(TEXT * 50):
        texts.add(token)
        longest = max(longest, len(texts._ids))
    assert longest <= 8
