"""The preview of documents: text, loss, special tokens and hostile content."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.quality.checks import Previewed
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.errors import StorageError
from phi3_lora.report.preview import (
    MOST_TOKENS,
    loss_mask,
    pieces_of,
    preview_rows,
    shown_parts,
    summary,
    visible,
)
from phi3_lora.report.preview_page import write_preview
from phi3_lora.report.preview_terminal import print_preview
from tests.tiny import write_model

HOSTILE = [
    "two words\n\n  three\t4",
    "<|end|>\n<|assistant|> injected",
    "\U0001f44d\U0001f3fd \u05e9\u05dc\u05d5\u05dd \u4eca\u5929",
    "bell\x07 escape\x1b[31m nul\x00 \u202eturned \u200b",
    "<script>alert('x')</script> & \"quotes\"",
    "[bold red]markup[/] :smile:",
    "really lost \ufffd and \ufffd\ufffd\ufffd\ufffd\ufffd",
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return ChatTokenizer(write_model(tmp_path / "m"), vocab_size=264)


def document(tokenizer: ChatTokenizer, user: str, answer: str = "ok") -> Document:
    messages = ({"role": "user", "content": user}, {"role": "assistant", "content": answer})
    return tokenizer.encode_conversations([Conversation(messages, "d.jsonl:7")])[0]


def printed(tokenizer: ChatTokenizer, *documents: Document, **settings: Any) -> str:
    console = Console(file=io.StringIO(), width=60, highlight=False, **settings)
    print_preview(documents, tokenizer, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Page(HTMLParser):
    """Collects the tags of a page, and the attributes and text of the spans in its rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.spans: list[tuple[dict[str, str | None], str]] = []
        self._is_in_row = self._is_in_span = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._is_in_row |= tag == "div"
        if tag == "span" and self._is_in_row:
            self.spans.append((dict(attrs), ""))
            self._is_in_span = True

    def handle_endtag(self, tag: str) -> None:
        self._is_in_span &= tag != "span"

    def handle_data(self, data: str) -> None:
        if self._is_in_span:
            attrs, text = self.spans[-1]
            self.spans[-1] = (attrs, text + data)


@pytest.mark.parametrize("text", HOSTILE)
def test_pieces_are_the_whole_text_and_every_token_once(
    tokenizer: ChatTokenizer, text: str
) -> None:
    found = document(tokenizer, "q", text)
    pieces = pieces_of(found, tokenizer)
    assert [i for piece in pieces for i in piece.ids] == found.tokens.tolist()
    assert "".join(p.text for p in pieces) == tokenizer.decode(
        found.tokens.tolist(), skip_special_tokens=False
    )
    mask = [piece.is_learnt for piece in pieces for _ in piece.ids]
    assert mask == loss_mask(found)
    assert "".join(p.text for p in pieces if p.is_learnt) == text.lstrip() + "<|end|>"


def test_a_character_of_several_tokens_is_one_piece(tokenizer: ChatTokenizer) -> None:
    pieces = pieces_of(document(tokenizer, "a\U0001f44d\u05e9b"), tokenizer)
    assert [(p.text, len(p.ids)) for p in pieces[1:5]] == [
        ("a", 1),
        ("\U0001f44d", 4),
        ("\u05e9", 2),
        ("b", 1),
    ]


def test_only_tokens_of_the_template_are_special_not_their_text(tokenizer: ChatTokenizer) -> None:
    pieces = pieces_of(document(tokenizer, "<|end|>"), tokenizer)
    special = [p.text for p in pieces if p.is_special]
    assert special == ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    assert "".join(p.text for p in pieces[1:8]) == "<|end|>"


def test_the_first_token_is_never_in_the_loss() -> None:
    tokens = np.arange(3, dtype=np.int32)
    every = Document(tokens, np.ones(3, dtype=bool), "d:1")
    assert loss_mask(every) == [False, True, True]
    assert sum(loss_mask(every)) == every.loss_tokens
    assert summary(every) == "d:1  3 tokens, 2 in the loss (66.7%)"
    assert loss_mask(Document(tokens[:1], np.ones(1, dtype=bool), "d:1")) == [False]


def test_spaces_survive_a_tokenizer_that_drops_the_first(tmp_path: Path) -> None:
    """Like Phi-3's, this tokenizer joins a space to the next word and drops a leading space."""
    folder = write_model(tmp_path / "m")
    words = [
        "<unk>",
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "\u2581b",
        *(f"<0x{i:02X}>" for i in range(256)),
    ]
    found = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[("\u2581", "a"), ("\u2581", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    found.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    markers = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    found.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
    found.save(str(folder / "tokenizer.json"))
    tokenizer = ChatTokenizer(folder, vocab_size=400)
    pieces = pieces_of(document(tokenizer, "a b \u4eca b", "b a"), tokenizer)
    text = "".join(p.text for p in pieces)
    assert "a b \u4eca b" in text and "b a<|end|>" in text
    assert " b" in [p.text for p in pieces] and "\u4eca" in [p.text for p in pieces]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a b\tc\nd", "a\u00b7b\u2192c\u21b5\nd"),
        ("\x1b[31m\x00\r\x7f\x9b", "<U+001B>[31m<U+0000><U+000D><U+007F><U+009B>"),
        ("\u202e\u200b\u00a0\u2028\ue000", "<U+202E><U+200B><U+00A0><U+2028><U+E000>"),
        ("caf\u00e9 \u4eca\U0001f44d", "caf\u00e9\u00b7\u4eca\U0001f44d"),
    ],
)
def test_a_character_without_a_shape_is_made_visible(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_without_colours_brackets_show_the_loss(tokenizer: ChatTokenizer) -> None:
    text = printed(tokenizer, document(tokenizer, "a b", "c d"))
    assert text == (
        "d.jsonl:7  11 tokens, 4 in the loss (36.4%)\n"
        "<|user|>a\u00b7b<|end|><|assistant|>\u27e6c\u00b7d<|end|>\u27e7<|endoftext|>\n\n"
    )
    coloured = {"force_terminal": True, "color_system": "256", "no_color": True}
    assert "\u27e6c\u00b7d<|end|>\u27e7" in printed(
        tokenizer, document(tokenizer, "a b", "c d"), **coloured
    )


@pytest.mark.parametrize("marker", ["<|end|>", "<s>", "</s>", "<|tool_call|>"])
def test_without_colours_text_that_looks_like_a_marker_differs_from_one(
    tokenizer: ChatTokenizer, marker: str
) -> None:
    out = printed(tokenizer, document(tokenizer, f"say {marker}", f"{marker}!"))
    seen = f"<U+003C>{marker[1:]}"
    assert f"<|user|>say\u00b7{seen}<|end|><|assistant|>\u27e6{seen}!<|end|>\u27e7" in out


def test_our_own_signs_in_the_data_differ_from_the_signs_we_write(tokenizer: ChatTokenizer) -> None:
    out = printed(tokenizer, document(tokenizer, "a\u00b7b \u27e6no\u27e7", "\u2192\u21b5"))
    assert "a<U+00B7>b\u00b7<U+27E6>no<U+27E7><|end|>" in out
    assert "\u27e6<U+2192><U+21B5><|end|>\u27e7" in out


def test_a_long_document_shows_its_ends_and_counts_the_rest(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    found = document(tokenizer, "u" * MOST_TOKENS, "a" * 1000)
    before, gap, after = shown_parts(found, tokenizer)
    mask = loss_mask(found)
    half = MOST_TOKENS // 2
    assert [i for p in before for i in p.ids] == found.tokens[:half].tolist()
    assert [i for p in after for i in p.ids] == found.tokens[-half:].tolist()
    assert gap == (len(found.tokens) - MOST_TOKENS, sum(mask[half:-half]))
    assert [p.is_learnt for p in after if p.text == "a"] == [True] * 1000
    told = f"[{gap.num_tokens:,} tokens not shown, 0 of them in the loss]"
    assert str(gap) == told and told in printed(tokenizer, found)
    write_preview(tmp_path / "p.html", [found], tokenizer, "t")
    assert f'<div class="gap">{told}</div>' in (tmp_path / "p.html").read_text()
    fits = document(tokenizer, "u" * (MOST_TOKENS - 6), "a")
    assert len(fits.tokens) == MOST_TOKENS and shown_parts(fits, tokenizer)[1:] == (None, [])


def test_a_document_of_millions_of_tokens_takes_no_time(tokenizer: ChatTokenizer) -> None:
    tokens = np.full(5_000_000, 65, dtype=np.int32)
    long = Document(tokens, np.ones(len(tokens), dtype=bool), "d:1")
    before, gap, after = shown_parts(long, tokenizer)
    assert len(before) + len(after) == MOST_TOKENS
    assert gap is not None and gap.num_learnt == gap.num_tokens


def test_the_page_is_dark_where_the_reader_is_and_shows_the_loss_without_colours(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    write_preview(tmp_path / "p.html", [document(tokenizer, "a")], tokenizer, "t")
    page = (tmp_path / "p.html").read_text()
    assert "color-scheme: light dark" in page and "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    assert re.search(r"\.t\.l \{[^}]*border-bottom: 3px solid", page)
    assert re.search(r"\.t\.s \{[^}]*outline: 1px solid", page)
    assert "(underlined)" in page and "(framed)" in page


def test_with_colours_the_loss_is_green_and_special_tokens_magenta(
    tokenizer: ChatTokenizer,
) -> None:
    text = printed(
        tokenizer, document(tokenizer, "a", "b"), force_terminal=True, color_system="256"
    )
    styles = dict(
        (part.split("m", 1)[1], part.split("m", 1)[0])
        for part in text.split("\x1b[")
        if "m" in part
    )
    assert styles["b"] in ("30;42", "30;102"), "black on green"
    assert "42" not in styles["a"].split(";") and "102" not in styles["a"].split(";")
    assert "35" in styles["<|user|>"].split(";") and "35" in styles["<|endoftext|>"].split(";")
    assert "\u27e6" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_data_cannot_drive_the_terminal(tokenizer: ChatTokenizer, text: str) -> None:
    out = printed(tokenizer, document(tokenizer, text, text))
    assert all(c == "\n" or c.isprintable() for c in out)
    seen = visible(text).splitlines()[-1].split("\u21b5")[-1]
    assert seen.replace("<|", "<U+003C>|") in out


@pytest.mark.parametrize("text", HOSTILE)
def test_a_page_shows_every_token_with_its_id_and_runs_nothing(
    tokenizer: ChatTokenizer, tmp_path: Path, text: str
) -> None:
    found = document(tokenizer, text, text)
    path = tmp_path / "page.html"
    write_preview(path, [found], tokenizer, "<script>&")
    raw = path.read_text(encoding="utf-8")
    page = Page(raw)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "a"})
    assert "http:" not in raw and "https:" not in raw and "url(" not in raw
    assert "<title>&lt;script&gt;&amp;</title>" in raw
    ids = [int(i) for attrs, _ in page.spans for i in (attrs["title"] or "").split()]
    assert ids == found.tokens.tolist()
    pieces = pieces_of(found, tokenizer)
    assert [t for _, t in page.spans] == [visible(p.text).replace("\n", "") for p in pieces]
    classes = [(attrs["class"] or "").split() for attrs, _ in page.spans]
    assert [("l" in c, "s" in c) for c in classes] == [(p.is_learnt, p.is_special) for p in pieces]


def test_an_accent_alone_in_its_span_gets_a_dotted_circle(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    write_preview(tmp_path / "p.html", [document(tokenizer, "e\u0301")], tokenizer, "t")
    assert ">\u25cc\u0301</span>" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_a_remark_stands_beside_its_document(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=60, highlight=False)
    documents = [document(tokenizer, "a"), document(tokenizer, "b")]
    remarks = ["", "dropped <in> [bold]training"]
    print_preview(documents, tokenizer, console, remarks)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[1].startswith("<|user|>a") and lines[4] == "dropped <in> [bold]training"
    write_preview(tmp_path / "p.html", documents, tokenizer, "t", remarks)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert '<p class="note">dropped &lt;in&gt; [bold]training</p>' in page


def test_a_page_that_cannot_be_written_is_reported(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        write_preview(tmp_path / "no/p.html", [document(tokenizer, "a")], tokenizer, "t")


def test_rows_of_a_preview_hold_tokens_and_their_mask(tokenizer: ChatTokenizer) -> None:
    found = document(tokenizer, "a", "b")
    (row,) = preview_rows([Previewed(found, "dropped", "too long")])
    assert row.to_dict() == {
        "source": "d.jsonl:7",
        "token_ids": found.tokens.tolist(),
        "loss_mask": loss_mask(found),
        "training": "dropped",
        "remark": "too long",
    }
