"""The MLX backend: a Phi-3 forward with native LoRA layers, on Apple silicon (and Linux).

`import phi3_lora_mlx as lora` also offers loralib's layers and functions, for your own training
code.
"""

from phi3_lora_mlx.blas import preload_blas

# Before the first import of mlx.core: on Linux, MLX links a slow BLAS with a single thread.
BLAS = preload_blas()

from phi3_lora_mlx.backend import MlxBackend  # noqa: E402
from phi3_lora_mlx.loralib import (  # noqa: E402
    Embedding,
    Linear,
    MergedLinear,
    load_lora_state_dict,
    lora_state_dict,
    mark_only_lora_as_trainable,
)

__all__ = [
    "BLAS",
    "Embedding",
    "Linear",
    "MergedLinear",
    "MlxBackend",
    "load_lora_state_dict",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]
