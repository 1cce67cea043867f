"""The MLX backend: a Phi-3 forward with native LoRA layers, on Apple silicon (and Linux)."""

from phi3_lora_mlx.blas import preload_blas

# Before the first import of mlx.core: what MLX links on Linux is one thread of textbook loops.
BLAS = preload_blas()

from phi3_lora_mlx.backend import MlxBackend  # noqa: E402

__all__ = ["BLAS", "MlxBackend"]
