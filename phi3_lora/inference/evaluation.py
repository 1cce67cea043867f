"""Loss, perplexity, token accuracy and exact match of a model on documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.engine.protocol import Engine
from phi3_lora.engine.request import Sampling
from phi3_lora.inference.generation import Piece, encode_prompts, generate

SCORING_TOKENS = 4096
"""Most tokens in a scoring batch; a longer document is a batch alone."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a model on supervised tokens."""

    loss: float
    """Nats per supervised token."""
    perplexity: float
    token_accuracy: float
    """Share of supervised tokens whose target has the largest logit."""
    loss_tokens: int
    num_documents: int

    def to_dict(self) -> dict[str, Any]:
        """Return the scores by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer and the expected one."""

    prompt: str
    expected: str
    given: str

    @property
    def is_exact(self) -> bool:
        """True if both texts are equal after white space at their ends is removed."""
        return self.expected.strip() == self.given.strip()


def token_batches(
    documents: Sequence[Document], limit: int = SCORING_TOKENS
) -> Iterator[Sequence[Document]]:
    """Group documents in order, with at most limit tokens in a group of several."""
    group: list[Document] = []
    size = 0
    for document in documents:
        if group and size + len(document.tokens) > limit:
            yield group
            group, size = [], 0
        group.append(document)
        size += len(document.tokens)
    if group:
        yield group


def evaluate(
    engine: Engine,
    documents: Sequence[Document],
    on_progress: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Score every document once.

    Args:
        engine: the model.
        documents: at least one; each has a supervised token.
        on_progress: receives the number of documents that were just scored.
    """
    nats, correct, supervised = 0.0, 0, 0
    for group in token_batches(documents):
        scores = engine.score(make_batch(group))
        nats += float(scores.nats.sum())
        correct += int(scores.correct.sum())
        supervised += int(scores.supervised.sum())
        on_progress(len(group))
    loss = nats / supervised
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        token_accuracy=correct / supervised,
        loss_tokens=supervised,
        num_documents=len(documents),
    )


def answer_conversations(
    engine: Engine,
    tokenizer: ChatTokenizer,
    rows: Sequence[Conversation],
    sampling: Sampling,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Generate the last answer of each conversation.

    Args:
        engine: the model.
        tokenizer: the model's tokenizer.
        rows: conversations; plain text and rows that do not end with an answer are skipped.
        sampling: how tokens are chosen.
        on_progress: receives the number of conversations that were just answered.

    Returns:
        Answers in the order of the rows.
    """
    asked = [
        row.messages for row in rows if row.messages[-1]["role"] == "assistant" and not row.whole
    ]
    on_progress(len(rows) - len(asked))

    def count(piece: Piece) -> None:
        if piece.finish_reason is not None:
            on_progress(1)

    prompts = encode_prompts(tokenizer, [messages[:-1] for messages in asked])
    given = generate(engine, tokenizer, prompts, sampling, count)
    return [
        Answer(messages[-2]["content"], messages[-1]["content"], generation.text)
        for messages, generation in zip(asked, given, strict=True)
    ]
