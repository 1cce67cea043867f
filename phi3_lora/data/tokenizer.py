"""A model folder's tokenizer: text to ids and back, and conversations to documents."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from phi3_lora.backend import Bool, Int32
from phi3_lora.data.records import Conversation, Message
from phi3_lora.data.template import ChatTemplate
from phi3_lora.errors import DataError, ModelError, listing
from phi3_lora.model_folder import read_json

_NOT_SPACES = "\x1c\x1d\x1e\x1f"
"""White space to Python, not to Unicode, nor to the tokenizers library."""
_ROWS_AT_ONCE = 1000
_SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in _NOT_SPACES)


class Document(NamedTuple):
    """One conversation as the model sees it."""

    tokens: Int32
    """(N,) ids."""
    supervised: Bool
    """(N,) True where the id itself is to be learnt."""
    source: str
    """file:line."""

    @property
    def loss_tokens(self) -> int:
        """Ids that are learnt; the first id has nothing before it and never counts."""
        return int(self.supervised[1:].sum())


class _Rendered(NamedTuple):
    """A conversation as text with its structure."""

    text: str
    contents: list[tuple[int, int]]
    """Characters [start, end) of each message's content."""
    learnt: list[tuple[int, int]]
    """Characters [start, end) of each answer with its end-of-turn token."""


class ChatTokenizer:
    """Tokenizer and chat template of a model folder, without transformers."""

    def __init__(self, model_dir: Path, *, vocab_size: int) -> None:
        """Read tokenizer.json and the chat template.

        Raises:
            ModelError: when a file is missing or damaged, there is no chat template, or the
                tokenizer has more ids than the model.
        """
        path = model_dir / "tokenizer.json"
        if not path.exists():
            raise ModelError(f"{model_dir} has no tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as cause:  # the library raises bare Exception
            raise ModelError(f"{path} is damaged: {cause}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A second copy that reads special tokens as plain text, for what users write.
        self._plain = Tokenizer.from_str(self._tokenizer.to_str())
        self._plain.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {t.content: (i, t) for i, t in added.items() if t.special}
        self._special_ids = np.array([i for i, _ in self._special.values()], dtype=np.int32)
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if largest >= vocab_size:
            raise ModelError(
                f"{model_dir}: the tokenizer has id {largest}, the model only {vocab_size} ids"
            )
        config_path = model_dir / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        self.template = ChatTemplate(
            _template_source(model_dir, config), _special_token_strings(config)
        )
        self.end_of_turn_id = self._find_end_of_turn()

    def _find_end_of_turn(self) -> int | None:
        """Id of the special token that the template puts after an answer."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text, spans = self.template.content_spans(probe)
        token = self._special_at(text, spans[-1][1])
        return None if token is None else self._special[token][0]

    def _special_at(self, text: str, at: int) -> str | None:
        """The longest special token that begins at a character, white space apart."""
        while at < len(text) and _is_space(text[at]):
            at += 1
        matches = [token for token in self._special if text.startswith(token, at)]
        return max(matches, key=len, default=None)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; special tokens in it are ordinary text."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant's next answer begins."""
        text, contents = self.template.content_spans(messages, add_generation_prompt=True)
        ids, _ = self._encode(_Rendered(text, contents, []))
        return ids

    def encode_conversations(self, rows: Sequence[Conversation]) -> list[Document]:
        """Each conversation as a document whose answers are supervised.

        Raises:
            DataError: when the template refuses rows; all are listed with file:line.
        """
        rendered, problems = [], []
        for row in rows:
            try:
                rendered.append(self._render(row.messages))
            except DataError as cause:
                problems.append(f"{row.source}: {cause}")
        if problems:
            raise DataError(listing(f"{len(problems):,} row(s) cannot be rendered:", problems))
        documents: list[Document] = []
        # In parts: ids and offsets as Python objects take 50 times a document's arrays.
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            documents += self._encode_part(rendered[part], [row.source for row in rows[part]])
        return documents

    def _encode_part(self, rendered: Sequence[_Rendered], sources: list[str]) -> list[Document]:
        simple = [i for i, r in enumerate(rendered) if not self._holds_marker(r)]
        batch = self._tokenizer.encode_batch(
            [rendered[i].text for i in simple], add_special_tokens=False
        )
        encoded = {i: (e.ids, e.offsets) for i, e in zip(simple, batch, strict=True)}
        return [
            self._document(*(encoded.get(i) or self._encode(r)), r, source)
            for i, (r, source) in enumerate(zip(rendered, sources, strict=True))
        ]

    def _render(self, messages: Sequence[Message]) -> _Rendered:
        text, contents = self.template.content_spans(messages)
        learnt = []
        for message, (start, end) in zip(messages, contents, strict=True):
            if message["role"] != "assistant":
                continue
            token = self._special_at(text, end)
            learnt.append((start, end if token is None else text.index(token, end) + len(token)))
        return _Rendered(text, contents, learnt)

    def _holds_marker(self, rendered: _Rendered) -> bool:
        """Whether a message's own text holds the text of a special token."""
        return any(
            token in rendered.text[start:end]
            for start, end in rendered.contents
            for token in self._special
        )

    def _encode(self, rendered: _Rendered) -> tuple[list[int], list[tuple[int, int]]]:
        if not self._holds_marker(rendered):
            encoding = self._tokenizer.encode(rendered.text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        return self._encode_by_segment(rendered)

    def _encode_by_segment(self, rendered: _Rendered) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode between the template's own special tokens, so that none in a message counts."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end, token in self._segments(rendered):
            if token is not None:
                ids.append(self._special[token][0])
                offsets.append((start, end))
                continue
            piece: Encoding = self._plain.encode(rendered.text[start:end], add_special_tokens=False)
            ids += piece.ids
            offsets += [(start + a, start + b) for a, b in piece.offsets]
        return ids, offsets

    def _segments(self, rendered: _Rendered) -> list[tuple[int, int, str | None]]:
        """The text as (start, end, special token or None), white space that tokens eat left out."""
        text = rendered.text
        found: list[tuple[int, int, str | None]] = []
        at = segment = 0
        inside = [c for c in rendered.contents if c[0] < c[1]]
        starts = [c[0] for c in inside]
        while at < len(text):
            current = bisect.bisect_right(starts, at) - 1
            if current >= 0 and at < inside[current][1]:
                at = inside[current][1]
                continue
            matches = [t for t in self._special if text.startswith(t, at)]
            token = max(matches, key=len, default=None)
            if token is None:
                at += 1
                continue
            flags = self._special[token][1]
            before = text[segment:at]
            kept = len(before.rstrip(_SPACES)) if flags.lstrip else len(before)
            found.append((segment, segment + kept, None))
            end = at + len(token)
            found.append((at, end, token))
            while flags.rstrip and end < len(text) and _is_space(text[end]):
                end += 1
            at = segment = end
        found.append((segment, len(text), None))
        return [(a, b, token) for a, b, token in found if a < b]

    def _document(
        self,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        rendered: _Rendered,
        source: str,
    ) -> Document:
        supervised = np.zeros(len(ids), dtype=bool)
        spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        tokens = np.asarray(ids, dtype=np.int32)
        # A marker's characters reach over the white space it eats, even an answer's own.
        marker = np.isin(tokens, self._special_ids)
        for start, end in rendered.learnt:
            # A token counts when any of its characters is learnt.
            touches = (spans[:, 1] > start) & (spans[:, 0] < end)
            supervised |= touches & (~marker | (spans[:, 0] >= start))
        return Document(tokens, supervised, source)


def _is_space(character: str) -> bool:
    """Whether a marker that eats white space eats this."""
    return character in _SPACES


def _template_source(model_dir: Path, config: dict[str, Any]) -> str:
    path = model_dir / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as cause:
            raise ModelError(f"{path} cannot be read: {cause}") from None
    source = config.get("chat_template")
    if isinstance(source, list):
        named = [e for e in source if isinstance(e, dict) and e.get("name") == "default"]
        source = named[0].get("template") if named else None
    if not isinstance(source, str):
        raise ModelError(
            f"{model_dir} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json): use an instruct model"
        )
    return source


def _special_token_strings(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token ... as strings; some releases store them as objects."""
    strings = {}
    for name, value in config.items():
        if not name.endswith("_token") or name.startswith("add_"):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            strings[name] = text
    return strings
