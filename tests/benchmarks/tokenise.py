"""Time tokenising chat rows, rendering and loss included, beside the bare tokenizers library.

Command: python tests/benchmarks/tokenise.py [--model DIR] [--data FILE] [--rows N] [--rounds N]
Without --data the rows are chats of four turns about the demo's orders, about 150 tokens each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.data.sources.reading import read_conversations
from phi3_lora.demo import DEMO_DATA_DIR, DEMO_MODEL_DIR


def main() -> None:
    """Print the best time of each contender and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=DEMO_MODEL_DIR)
    parser.add_argument("--data")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tokenizer = ChatTokenizer(options.model, vocab_size=2**31)
    bare = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    bare.no_padding()
    bare.no_truncation()
    rows = chat_rows(options.data, options.rows)
    texts = [tokenizer.template.render(row.messages) for row in rows]
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(options.rounds):
        theirs.append(seconds(lambda: bare.encode_batch(texts, add_special_tokens=False)))
        ours.append(seconds(lambda: tokenizer.encode_rows(rows)))
    tokens = sum(len(d.tokens) for d in tokenizer.encode_conversations(rows))
    for name, times in (("tokenizers", theirs), ("phi3-lora", ours)):
        print(f"{name:<11} {min(times):6.2f} s  {tokens / min(times):12,.0f} tokens/s")
    print(f"ratio {min(ours) / min(theirs):.2f} ({len(rows):,} rows, {tokens:,} tokens)")


def chat_rows(data: str | None, count: int) -> list[Conversation]:
    """Return count different rows, since a cache of whole texts would help with equal rows."""
    given = read_conversations(data or str(DEMO_DATA_DIR / "train.jsonl"))
    if data is not None:
        return [given[i % len(given)] for i in range(count)]
    rows = []
    for i in range(count):
        turns = [m for k in (0, 1, 7, 30) for m in given[(i * 3 + k) % len(given)].messages]
        turns = [m for m in turns if m["role"] != "system"]
        first = {**turns[0], "content": f"{turns[0]['content']} Order {i}, please."}
        rows.append(Conversation((first, *turns[1:]), f"made:{i + 1}"))
    return rows


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock time of one run, including the time to free its results."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
