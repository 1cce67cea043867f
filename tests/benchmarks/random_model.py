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
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.family import FAMILY
from tests.tiny import member_config, tiny_config, write_tokenizer

BFLOAT16 = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
CONFIGS = {
    "mini": member_config(FAMILY[0], **BFLOAT16),
    "tiny": tiny_config(vocab_size=32_064, **BFLOAT16),
}


def main() -> None:
    """Write config.json, tokenizer.json and model.safetensors."""
    folder, name = Path(sys.argv[1]), (sys.argv[2:] or ["mini"])[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
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
