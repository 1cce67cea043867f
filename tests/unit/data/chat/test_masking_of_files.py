"""The path from a file to the loss mask, with random hostile rows and bad rows.

The tokenizers are built like Phi-3's and Phi-4's, with tokens of several characters.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.documents.dataset import build_dataset
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.selection import Dataset
from phi3_lora.data.rows.conversation import BadRow, Conversation
from phi3_lora.data.sources.reading import iterate_rows, read_rows
from tests.tiny import MARKERS
from tests.unit.data.chat.test_family_templates import PHI4_MARKERS, TEMPLATES
from tests.unit.data.chat.test_masking import (
    Messages,
    answers,
    conversations,
    left_after_eating,
    talk,
)

PAIRS = ("a b", "e f", "\n\n", "\na", ".\n", "ab e", "<|", "|>", "en d", "> \n")
"""Merges of letters, of line ends with the next character, and of pieces of markers."""
EATS = {"like Phi-3's": "after", "like Phi-4's": "nothing"}
PHI3_SPACE = "▁"


@functools.cache
def merging_tokenizer(name: str, kind: str) -> ChatTokenizer:
    """Return a published template on a tokenizer with tokens that could cross borders."""
    published = TEMPLATES[name]
    markers = PHI4_MARKERS if "im_sep" in published.template else MARKERS
    tokenizer = _like_phi3() if kind == "like Phi-3's" else _like_phi4()
    tokenizer.add_special_tokens(
        [
            AddedToken(m, special=True, normalized=False, rstrip=EATS[kind] == "after")
            for m in markers
        ]
    )
    config = {"eos_token": MARKERS[0], "bos_token": MARKERS[0]}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({**config, "chat_template": published.template})
        )
        return ChatTokenizer(folder, vocab_size=1000)


def _merged(alphabet: list[str], pairs: list[tuple[str, str]]) -> models.BPE:
    words = dict.fromkeys([*alphabet, *(a + b for a, b in pairs)])
    return models.BPE(
        vocab={word: i for i, word in enumerate(words)}, merges=pairs, byte_fallback=True
    )


def _like_phi3() -> Tokenizer:
    """Return a tokenizer of characters and bytes that prepends a space to every text.

    Source: tokenizer.json of microsoft/Phi-3-mini-4k-instruct.
    """
    text = "".join(PAIRS).replace(" ", "") + PHI3_SPACE
    pairs = [(PHI3_SPACE, "a"), (PHI3_SPACE, PHI3_SPACE), ("a", "b"), ("e", "n"), ("en", "d")]
    pairs += [("\n", "\n"), ("\n", PHI3_SPACE), ("<", "|"), ("|", ">"), ("|>", "\n")]
    tokenizer = Tokenizer(_merged([f"<0x{i:02X}>" for i in range(256)] + sorted(set(text)), pairs))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(PHI3_SPACE), normalizers.Replace(" ", PHI3_SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(PHI3_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _like_phi4() -> Tokenizer:
    """Return a tokenizer of bytes whose merges may cross words and lines.

    Source: tokenizer.json of microsoft/phi-4, without its pattern, which allows fewer merges.
    """
    line, space = "Ċ", "Ġ"
    pairs = [(line, line), (line, "a"), (line, space), (space, "a"), ("a", "b"), ("e", "n")]
    pairs += [("en", "d"), ("<", "|"), ("|", ">"), ("|>", line), (".", line)]
    tokenizer = Tokenizer(_merged(sorted(pre_tokenizers.ByteLevel.alphabet()), pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class Row(NamedTuple):
    """A row of a file, and its problem."""

    messages: Messages
    kind: str | None = None
    """Kind of the problem; None for a good row."""
    message: int = 0
    """Number of the message with the problem."""


@st.composite
def bad_rows(draw: st.DrawFn) -> Row:
    """Draw a conversation with one damaged message."""
    messages = [*draw(conversations())]
    kind = draw(st.sampled_from(["encoding", "empty"]))
    places = [i for i, m in enumerate(messages) if kind == "encoding" or m["role"] == "assistant"]
    place = draw(st.sampled_from(places))
    content = draw(st.sampled_from(["", " ", "\n\t", "\u3000"]))
    if kind == "encoding":
        text = messages[place]["content"]
        at = draw(st.integers(0, len(text)))
        content = text[:at] + draw(st.sampled_from(["\ud800", "\udfff"])) + text[at:]
    messages[place] = {**messages[place], "content": content}
    return Row(tuple(messages), kind, place + 1)


def file_of(rows: list[Row], folder: Path, *, ascii_only: bool) -> Path:
    path = folder / "rows.jsonl"
    lines = [json.dumps({"messages": row.messages}, ensure_ascii=ascii_only) for row in rows]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogatepass"))
    return path


def learnt_answers(tokenizer: ChatTokenizer, document: Document) -> list[str]:
    """Decode the supervised tokens of each answer alone: Phi-3's decoder strips a first space."""
    runs: list[list[int]] = [[]]
    for token in document.tokens[document.supervised].tolist():
        runs[-1].append(token)
        if token == tokenizer.end_of_turn_id:
            runs.append([])
    assert runs.pop() == []
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def written(row: Row, name: str) -> list[dict[str, Any]]:
    """Return the messages that the template writes."""
    has_place = "first release" not in name
    return [
        m for m in row.messages if m["role"] != "system" or (has_place and m["content"].strip())
    ]


def check_notes(dataset: Dataset, rows: list[Row], name: str, eats: str) -> None:
    """Check the notes of a data set with independent counts."""
    markers = PHI4_MARKERS if "im_sep" in TEMPLATES[name].template else MARKERS
    texts = [[m["content"] for m in written(row, name)] for row in rows]
    marked = sum(any(marker in t for marker in markers for t in found) for found in texts)
    lost = [sum(len(t) - len(left_after_eating(t, eats)) for t in found) for found in texts]
    notes = "\n".join(dataset.notes)
    assert (f"d: {marked} of {len(rows)} rows hold markers as text" in notes) == bool(marked)
    eaten = sum(count > 0 for count in lost)
    note = f"d: {eaten} of {len(rows)} rows lose white space that markers beside a message strip ("
    assert (f"{note}{sum(lost):,} in all; " in notes) == bool(eaten)


# The tokenizer like Phi-3's decodes this character as a space.
def _comes_back(row: Row) -> bool:
    return all(PHI3_SPACE not in m["content"] for m in row.messages)


some_rows = st.lists(
    st.one_of(conversations().map(Row), bad_rows()).filter(_comes_back), max_size=5
)


@pytest.mark.parametrize("kind", EATS)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(rows=some_rows, last=answers.filter(lambda t: PHI3_SPACE not in t), ascii_only=st.booleans())
def test_answers_of_any_file_are_learnt_and_bad_rows_are_named(
    name: str, kind: str, rows: list[Row], last: str, ascii_only: bool
) -> None:
    tokenizer, eats = merging_tokenizer(name, kind), EATS[kind]
    rows = [*rows, Row(talk("a b", last))]
    with tempfile.TemporaryDirectory() as folder:
        path = file_of(rows, Path(folder), ascii_only=ascii_only)
        found = list(iterate_rows(path))
        conversations_read = read_rows(path, on_bad_row="skip").conversations
    for i, (row, read) in enumerate(zip(rows, found, strict=True), start=1):
        assert read.source == f"{path}:{i}"
        assert (read.kind if isinstance(read, BadRow) else None) == row.kind
        if isinstance(read, BadRow) and (row.kind == "empty" or ascii_only):
            assert read.problem.startswith(f"message {row.message}")
        if isinstance(read, Conversation):
            assert read.messages == row.messages
    good = [row for row in rows if row.kind is None]
    dataset = build_dataset(conversations_read, tokenizer, Encoding(max_length=10**6), "d")
    end = TEMPLATES[name].end
    for row, document in zip(good, dataset.documents, strict=True):
        said = [m["content"] for m in row.messages if m["role"] == "assistant"]
        expected = [left_after_eating(text, eats) + end for text in said]
        assert learnt_answers(tokenizer, document) == expected
        # The last answer begins at the end of the prompt that generate uses.
        prompt = tokenizer.encode_prompt(row.messages[:-1])
        assert document.tokens[: len(prompt)].tolist() == prompt
        assert document.supervised[len(prompt)] and not document.supervised[len(prompt) - 1]
    check_notes(dataset, good, name, eats)
