"""Time and memory of loading many short rows through the cache of tokens, and of their plan.

Command: XDG_CACHE_HOME=$(mktemp -d) python tests/benchmarks/large_data.py 600000 1200000
From 64 MiB on (500,000 rows) data goes through the cache. Every number of rows is loaded twice,
each time in a process of its own: made, then found. Then one more streams them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents.dataset import load_splits, resolve_data
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.store import document_lengths
from phi3_lora.data.documents.stream import StreamedRows
from phi3_lora.data.sources.source import Source
from phi3_lora.demo import DEMO_MODEL_DIR
from phi3_lora.training.plan.fixed import Plan
from phi3_lora.training.plan.streamed import StreamedPlan


def main() -> None:
    """Write and measure a file of each size; --load and --stream measure one file."""
    if sys.argv[1] == "--load":
        load(Path(sys.argv[2]))
        return
    if sys.argv[1] == "--stream":
        stream(Path(sys.argv[2]))
        return
    for count in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, count)
            for how in ("--load", "--load", "--stream"):
                subprocess.run([sys.executable, __file__, how, str(path)], check=True)


def write_rows(path: Path, count: int) -> None:
    """Write chats of one short turn."""
    with open(path, "w") as file:
        for i in range(count):
            turns = [("user", f"Order {i}: two red cups."), ("assistant", f"Order {i}: 2 cups.")]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def load(path: Path) -> None:
    """Print the time and peak memory of each part, without memory-mapped files."""
    tokenizer = ChatTokenizer(DEMO_MODEL_DIR, vocab_size=2**31)
    said: list[str] = []
    with Memory() as memory:
        began = time.perf_counter()
        train, _ = load_splits(
            resolve_data(str(path)),
            tokenizer,
            Encoding(max_length=2048),
            valid_fraction=0.01,
            seed=0,
            note=said.append,
        )
        seconds = time.perf_counter() - began
    num_tokens = int(document_lengths(train.documents).sum())
    print(
        f"{len(train.documents):,} documents, {num_tokens:,} tokens, {said[0].split()[0]}: "
        f"{seconds:.1f} s, {memory.peak_bytes / 2**20:,.0f} MiB",
        flush=True,
    )
    for packing in (False, True):
        with Memory() as memory:
            began = time.perf_counter()
            Plan(
                train.documents,
                rows_per_step=8,
                num_epochs=1,
                max_steps=-1,
                seed=0,
                row_tokens=2048 if packing else None,
            ).hash()
            seconds = time.perf_counter() - began
        name = "packed plan" if packing else "plan"
        print(f"  {name}: {seconds:.1f} s, {memory.peak_bytes / 2**20:,.0f} MiB", flush=True)


def stream(path: Path) -> None:
    """Print the time to the first step, to the last step of a pass, and to resume after it."""
    tokenizer = ChatTokenizer(DEMO_MODEL_DIR, vocab_size=2**31)
    rows = StreamedRows([Source(path=str(path))], tokenizer, Encoding(max_length=2048), 10_000)

    def plan() -> StreamedPlan:
        return StreamedPlan(rows, rows_per_step=8, max_steps=10**8, seed=0)

    with Memory() as memory:
        began = time.perf_counter()
        steps = plan().steps()
        step = next(steps)
        print(f"streamed, first step: {time.perf_counter() - began:.1f} s", flush=True)
        positions = [step.position]
        while not step.ends_epoch:
            step = next(steps)
            positions = [*positions[-1:], step.position]
        print(f"  a pass of {step.number:,} steps: {time.perf_counter() - began:.1f} s", flush=True)
        began = time.perf_counter()
        next(plan().steps(after=step.number - 1, position=positions[0]))
        seconds = time.perf_counter() - began
    print(
        f"  to go on from its end: {seconds:.1f} s; {memory.peak_bytes / 2**20:,.0f} MiB in all",
        flush=True,
    )


class Memory:
    """Measure the peak private memory of this process, 50 times a second."""

    def __enter__(self) -> Memory:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            size = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak_bytes = max(self.peak_bytes, size * 1024)


if __name__ == "__main__":
    main()
