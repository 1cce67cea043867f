"""Measure the laws in half precision and on quantised bases, on the CPU.

python tests/benchmarks/precision.py --model demo --data demo --steps 20
"""

from __future__ import annotations

import argparse

from phi3_lora.data.documents.dataset import build_dataset, resolve_scoring_file
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.sources.reading import read_conversations
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.engine.registry import load_backend
from phi3_lora.inference.base_model import find_base_model
from phi3_lora.inference.loading import check_for_backend
from phi3_lora.verification.parity import Trial, cross_laws, measure, own_laws, random_start

SETTINGS = (
    *(("float32", q) for q in ("none", "8bit", "4bit")),
    *(("bfloat16", q) for q in ("none", "4bit")),
    *(("float16", q) for q in ("none", "4bit")),
)


def rows(trial: Trial, dtype: str) -> list[tuple[str, float]]:
    """Return the name and value of each law, with PyTorch as the first backend."""
    torch, mlx = load_backend("cuda"), load_backend("mlx")
    first = measure(trial, torch, "cpu", dtype=dtype)
    second = measure(trial, mlx, "cpu", first.trained, dtype=dtype)
    std = float(first.base_logits.std())
    found = []
    for law in [*cross_laws(first, second), *own_laws("PyTorch", first), *own_laws("MLX", second)]:
        value = law.value / std if "logits" in law.what else law.value
        found.append((f"{law.law} {law.what}", value))
    return found


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="dtype/quantize, comma-separated")
    options = parser.parse_args()
    chosen = [tuple(one.split("/")) for one in options.only.split(",") if one] or SETTINGS
    columns = {}
    for dtype, quantize in chosen:
        base = find_base_model(options.model, quantize=quantize)
        conversations = read_conversations(resolve_scoring_file(options.data))[: 4 * options.steps]
        dataset = build_dataset(
            conversations, base.tokenizer, Encoding(max_length=2048, context=4096), options.data
        )
        shapes = base.config.linear_shapes()
        spec = LoraSpec.uniform(shapes, r=8, scaling=2.0)
        checked = check_for_backend(base, load_backend("cuda"), print)
        trial = Trial(checked, dataset.documents, spec, random_start(spec, shapes), options.steps)
        columns[f"{dtype} {quantize}"] = dict(rows(trial, dtype))
    print("| law | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(f"{c[name]:.1e}" for c in columns.values()) + " |")


if __name__ == "__main__":
    main()
