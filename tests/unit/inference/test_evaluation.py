"""Generated answers and the expected answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.engine.request import Sampling
from phi3_lora.inference.evaluation import answer_conversations
from tests.tiny import write_tokenizer
from tests.unit.toy_engine import ToyEngine

STOP = 1


class ScriptedEngine(ToyEngine):
    """An engine that answers a batch together and finishes later prompts first."""

    def __init__(self, scripts: list[list[int]]) -> None:
        super().__init__()
        self._scripts = scripts
        self.prompts: list[list[int]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        self.prompts = [list(prompt) for prompt in prompts]
        for place in range(max(map(len, self._scripts))):
            for index, script in enumerate(self._scripts):
                if place < len(script):
                    yield index, script[place]


def row(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return Conversation(tuple(messages), "test:1")


def test_answers_come_in_the_order_of_the_rows_and_each_is_reported(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = ChatTokenizer(tmp_path, vocab_size=264)
    texts = [tokenizer.encode_text(text) for text in ("abc", "x", "yz")]
    # max_new_tokens ends the first answer, a stop token the second, the context the third.
    engine = ScriptedEngine([texts[0], [*texts[1], STOP], texts[2]])
    rows = [row("one", "abc"), row("no answer"), row("two", "y"), row("three", "yz")]
    reported: list[int] = []
    answers = answer_conversations(
        engine,
        tokenizer,
        rows,
        Sampling(max_new_tokens=len(texts[0]), stop_ids=frozenset({STOP})),
        reported.append,
    )
    assert [(a.prompt, a.expected, a.given) for a in answers] == [
        ("one", "abc", "abc"),
        ("two", "y", "x"),
        ("three", "yz", "yz"),
    ]
    assert [a.is_exact for a in answers] == [True, False, True]
    assert engine.prompts[0] == tokenizer.encode_prompt([{"role": "user", "content": "one"}])
    assert reported == [1, 1, 1, 1]
