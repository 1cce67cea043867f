"""Tokenizer of a model folder: text to ids and back, and conversations to documents."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from phi3_lora.arrays import Bool, Int32
from phi3_lora.data.chat.markers import Markers, Span
from phi3_lora.data.chat.masking import supervised_between, supervised_tokens
from phi3_lora.data.chat.rendering import Remarks, Rendered, Renderer
from phi3_lora.data.chat.row_shapes import CachedRendering, Shapes
from phi3_lora.data.chat.template import (
    ChatTemplate,
    read_template_file,
    special_token_strings,
    template_source,
)
from phi3_lora.data.options import LossOn
from phi3_lora.data.rows.conversation import Conversation, Message
from phi3_lora.errors import ConfigError, DataError, ModelError, listing
from phi3_lora.storage.json_file import read_json

_ROWS_AT_ONCE = 1000
_NO_REMARKS = Remarks()
Ids = tuple[Sequence[int], Sequence[Span]]
"""Ids of a text, and the span of characters of each id."""


class Document(NamedTuple):
    """One conversation as token ids with a loss mask."""

    tokens: Int32
    """(N,) ids."""
    supervised: Bool
    """(N,) True for each id to learn."""
    source: str
    """file:line."""
    remarks: Remarks = Remarks()

    @property
    def loss_tokens(self) -> int:
        """Number of ids in the loss; the first id never counts, since no id comes before it."""
        return int(self.supervised[1:].sum())


class ChatTokenizer:
    """Tokenizer and chat template of a model folder, without transformers."""

    def __init__(
        self, model_dir: Path, *, vocab_size: int, template_file: str | Path | None = None
    ) -> None:
        """Read tokenizer.json and the chat template.

        Args:
            model_dir: the model folder.
            vocab_size: number of ids of the model.
            template_file: a Jinja file that replaces the folder's template.

        Raises:
            ModelError: when a file is missing or damaged, there is no chat template, or the
                tokenizer has more ids than the model.
            ConfigError: when the template file cannot be used.
        """
        self._tokenizer = _read_tokenizer(model_dir / "tokenizer.json", vocab_size)
        config_path = model_dir / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        self._strings = special_token_strings(config)
        eos = self._strings.get("eos_token")
        self._eos_id = None if eos is None else self._tokenizer.token_to_id(eos)
        self.has_own_template = template_file is not None
        """True if a file replaces the model's chat template."""
        if template_file is None:
            self._use(ChatTemplate(template_source(model_dir, config), self._strings))
            return
        template = read_template_file(Path(template_file).expanduser(), self._strings)
        try:
            self._use(template)
        except DataError as cause:
            raise ConfigError(
                f"data.chat_template: {template_file} cannot be used: {cause}. A template must "
                "write each message's content once, in order, as it is"
            ) from None

    def _use(self, template: ChatTemplate) -> None:
        added = self._tokenizer.get_added_tokens_decoder()
        # Added tokens that the template writes count as special, whatever the tokenizer says: a
        # user's message must not be able to write them.
        markers = {i: t for i, t in added.items() if t.special or t.content in template.source}
        self._plain = _reading_as_text(self._tokenizer, markers)
        self._renderer = Renderer(
            template, Markers({i: (t.content, t) for i, t in markers.items()})
        )
        self._shapes = Shapes(self._renderer)
        self._marker_ids = np.array(self._renderer.markers.ids, dtype=np.int32)
        self._is_marker = np.zeros(_num_ids(self._tokenizer), dtype=bool)
        self._is_marker[self._marker_ids] = True
        end = self._renderer.end_of_turn
        self.end_of_turn_id = None if end is None else self._tokenizer.token_to_id(end)
        self.notes = self._renderer.notes()
        """Notes for the user on the template."""

    @property
    def template(self) -> ChatTemplate:
        """The chat template in use."""
        return self._renderer.template

    @property
    def identity(self) -> str:
        """sha256 of everything that ids depend on: tokenizer.json, the template, the library."""
        parts = [self._tokenizer.to_str(), self.template.source, version("tokenizers")]
        held = json.dumps([*parts, self._strings], sort_keys=True)
        return hashlib.sha256(held.encode()).hexdigest()

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text; the text of a special token is encoded as text."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation up to the start of the assistant's next answer."""
        return list(self._encode(self._renderer.prompt(messages))[0])

    def encode_conversations(
        self, rows: Sequence[Conversation], *, loss_on: LossOn = "assistant"
    ) -> list[Document]:
        """Encode conversations as documents.

        Args:
            rows: conversations.
            loss_on: the tokens in the loss: assistant (every answer with its end token), last
                (the last answer) or all; weights of a row take precedence.

        Raises:
            DataError: when rows cannot be rendered; the message counts them all and lists the
                first with file:line.
        """
        documents, problems = self.encode_rows(rows, loss_on=loss_on)
        if problems:
            raise DataError(listing(f"{len(problems):,} row(s) cannot be rendered:", problems))
        return [document for document in documents if document is not None]

    def encode_rows(
        self, rows: Sequence[Conversation], *, loss_on: LossOn = "assistant"
    ) -> tuple[list[Document | None], list[str]]:
        """Encode conversations, and return the problems of rows that cannot be rendered.

        Returns:
            One document per row, or None; `file:line: reason` of each row without a document.
        """
        documents: list[Document | None] = []
        problems: list[str] = []
        waiting: _Part | None = None
        # The library encodes one part on all cores while Python works on the parts next to it.
        # Parts are small: ids and offsets as Python objects take 50 times the memory of arrays.
        with ThreadPoolExecutor(max_workers=1) as pool:
            for first in range(0, len(rows), _ROWS_AT_ONCE):
                part = self._begin(rows[first : first + _ROWS_AT_ONCE], loss_on, problems, pool)
                documents += self._finish(waiting, loss_on) if waiting else []
                waiting = part
            documents += self._finish(waiting, loss_on) if waiting else []
        return documents, problems

    def _begin(
        self,
        rows: Sequence[Conversation],
        loss_on: LossOn,
        problems: list[str],
        pool: ThreadPoolExecutor,
    ) -> _Part:
        known: dict[int, CachedRendering] = {}
        rendered: dict[int, Rendered] = {}
        for i, row in enumerate(rows):
            cached = self._shapes.cached(row, loss_on)
            if cached is not None:
                known[i] = cached
                continue
            try:
                rendered[i] = self._renderer.conversation(row, loss_on)
            except DataError as cause:
                problems.append(f"{row.source}: {cause}")
                continue
            self._shapes.learn(row, loss_on, rendered[i])
        texts = [cached.text for cached in known.values()]
        encode = self._tokenizer.encode_batch_fast
        return _Part(rows, known, rendered, pool.submit(encode, texts, add_special_tokens=False))

    def _finish(self, part: _Part, loss_on: LossOn) -> list[Document | None]:
        rows, known, rendered, encoding = part
        found = _known_documents(rows, known, encoding.result(), self._is_marker)
        for i in known.keys() - found.keys():
            rendered[i] = self._renderer.conversation(rows[i], loss_on)
        found |= self._encode_rendered(rendered, rows)
        return [found.get(i) for i in range(len(rows))]

    def _encode_rendered(
        self, rendered: Mapping[int, Rendered], rows: Sequence[Conversation]
    ) -> dict[int, Document]:
        texts = {i: r.text for i, r in rendered.items() if not _needs_parts(r)}
        batch = self._tokenizer.encode_batch(list(texts.values()), add_special_tokens=False)
        encoded: dict[int, Ids] = {i: (e.ids, e.offsets) for i, e in zip(texts, batch, strict=True)}
        return {
            i: self._document(encoded.get(i) or self._encode(r), r, rows[i].source)
            for i, r in rendered.items()
        }

    def _encode(self, rendered: Rendered) -> Ids:
        if rendered.is_plain:
            return self._encode_plain_text(rendered.text)
        if _needs_parts(rendered):
            return self._encode_in_parts(rendered)
        encoding = self._tokenizer.encode(rendered.text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _encode_in_parts(self, rendered: Rendered) -> Ids:
        """Encode the text between the template's special tokens; markers in messages are text."""
        ids: list[int] = []
        offsets: list[Span] = []
        segments = self._renderer.markers.segments(
            rendered.text, rendered.contents, rendered.borders
        )
        for start, end, marker in segments:
            if marker is not None:
                ids.append(marker.id)
                offsets.append((start, end))
                continue
            piece = self._plain.encode(rendered.text[start:end], add_special_tokens=False)
            ids += piece.ids
            offsets += [(start + a, start + b) for a, b in piece.offsets]
        return ids, offsets

    def _encode_plain_text(self, text: str) -> Ids:
        """Encode plain text with the tokenizer's own special tokens, and with the end token."""
        piece = self._plain.encode(text, add_special_tokens=True)
        ids, offsets = list(piece.ids), list(piece.offsets)
        if self._eos_id is not None and ids[-1:] != [self._eos_id]:
            ids.append(self._eos_id)
            offsets.append((len(text), len(text)))
        return ids, offsets

    def _document(self, encoded: Ids, rendered: Rendered, source: str) -> Document:
        ids, offsets = encoded
        tokens = np.asarray(ids, dtype=np.int32)
        supervised = supervised_tokens(tokens, offsets, rendered.loss, self._marker_ids)
        return Document(tokens, supervised, source, rendered.remarks)


class _Part(NamedTuple):
    """Rows whose encoding is under way."""

    rows: Sequence[Conversation]
    known: dict[int, CachedRendering]
    """Index in rows -> text, if it is known without running the template."""
    rendered: dict[int, Rendered]
    """Index in rows -> text that the template wrote."""
    encoding: Future[list[Encoding]]
    """Encodings of the texts in known."""


def _known_documents(
    rows: Sequence[Conversation],
    known: Mapping[int, CachedRendering],
    encoded: Sequence[Encoding],
    is_marker: Bool,
) -> dict[int, Document]:
    """Return the documents of rows that hold exactly the markers that the template wrote."""
    ids = [encoding.ids for encoding in encoded]
    tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int32)
    ends = np.cumsum([len(some) for some in ids], dtype=np.int64)
    losses = [cached.loss for cached in known.values()]
    supervised, strange = supervised_between(tokens, ends, losses, is_marker)
    found: dict[int, Document] = {}
    start = 0
    for place, ((i, cached), end) in enumerate(zip(known.items(), ends.tolist(), strict=True)):
        if place not in strange:
            remarks = (
                Remarks(num_stripped=cached.num_stripped) if cached.num_stripped else _NO_REMARKS
            )
            # Copies: a view would keep the arrays of dropped documents in memory.
            mine = tokens[start:end].copy(), supervised[start:end].copy()
            found[i] = Document(*mine, rows[i].source, remarks)
        start = end
    return found


def _needs_parts(rendered: Rendered) -> bool:
    """Return whether a text must be encoded in parts, not in one call of the tokenizer."""
    return rendered.is_plain or rendered.remarks.has_marker_text or bool(rendered.borders)


def _read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    if not path.exists():
        raise ModelError(f"{path.parent} has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as cause:  # the library raises bare Exception
        raise ModelError(f"{path} is damaged: {cause}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    largest = _num_ids(tokenizer) - 1
    if largest >= vocab_size:
        raise ModelError(
            f"{path.parent}: the tokenizer has id {largest}, the model only {vocab_size} ids"
        )
    return tokenizer


def _num_ids(tokenizer: Tokenizer) -> int:
    """Return the largest id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _reading_as_text(tokenizer: Tokenizer, markers: Collection[int]) -> Tokenizer:
    """Copy a tokenizer; the copy reads markers as plain text, for text that users write."""
    raw: dict[str, Any] = json.loads(tokenizer.to_str())
    for entry in raw["added_tokens"]:
        entry["special"] = entry["id"] in markers
    plain = Tokenizer.from_str(json.dumps(raw))
    plain.encode_special_tokens = True
    return plain
