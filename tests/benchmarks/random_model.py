"""Write a random-weight Phi-3 folder of a true shape, in bfloat16, with a byte tokenizer.

Command: python tests/benchmarks/random_model.py FOLDER [mini | tiny]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from phi3_lora.model_folder import read_model_config
from tests.tiny import tiny_config, write_tokenizer

SHAPES = {
    # microsoft/Phi-3-mini-4k-instruct, config.json.
    "mini": {
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": 2047,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    },
    "tiny": {"vocab_size": 32_064, "dtype": "bfloat16", "torch_dtype": "bfloat16"},
}


def main() -> None:
    """Write config.json, tokenizer.json and model.safetensors."""
    folder, name = Path(sys.argv[1]), (sys.argv[2:] or ["mini"])[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(**SHAPES[name])))
    write_tokenizer(folder)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {}
    for tensor, shape in read_model_config(folder).tensor_shapes().items():
        if len(shape) == 1:
            value = torch.ones(shape, dtype=torch.bfloat16)
        else:
            scale = 0.02
            value = (torch.randn(shape, device=device) * scale).bfloat16().cpu()
        weights[tensor] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
