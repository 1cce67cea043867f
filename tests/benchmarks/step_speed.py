"""An optimizer step of each backend against a plain loop over single documents, in one process.

The loop runs one document at a time through the same model and the head only where the loss
counts. Command: python tests/benchmarks/step_speed.py --model DIR --data FILE --backend mlx
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from phi3_lora.adapters.adapter import initial_weights
from phi3_lora.backend import Engine, LoadRequest, LoraSpec
from phi3_lora.data.dataset import build_dataset, make_batch
from phi3_lora.data.records import read_conversations
from phi3_lora.loading import look_at_model
from phi3_lora.registry import load_backend


def main() -> None:
    """Print supervised tokens a second of both, in turns, medians last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    base = look_at_model(options.model)
    rows = read_conversations(Path(options.data))[: 4 * options.steps]
    documents = build_dataset(rows, base.tokenizer, max_length=2048, name="data").documents
    spec = LoraSpec(modules=tuple(base.config.linear_shapes()), r=16, scaling=2.0)
    start = initial_weights(base.config.linear_shapes(), r=16, seed=0)
    backend = load_backend(options.backend)
    speeds: dict[str, list[float]] = {"whole step": [], "document by document": []}
    engines: dict[str, Engine] = {}
    # A budget of one token makes every document a micro-batch of its own.
    for name, tokens in (("whole step", 8192), ("document by document", 1)):
        request = LoadRequest(
            model_dir=base.path, device="cpu", lora=spec, micro_batch_tokens=tokens
        )
        engines[name] = backend.open(request)
        engines[name].write_adapter(start)
    for step in range(1, len(documents) // 4 + 1):
        chosen = documents[4 * step - 4 : 4 * step]
        count = sum(d.loss_tokens for d in chosen)
        for name, engine in engines.items():
            began = time.perf_counter()
            result = engine.train_step(make_batch(chosen), loss_tokens=count, lr=1e-4, step=step)
            float(result.grad_norm)
            speeds[name].append(count / (time.perf_counter() - began))
    for name, found in speeds.items():
        print(f"{options.backend} {name}: {statistics.median(found[1:]):.1f} supervised tokens/s")


if __name__ == "__main__":
    main()
