"""Requests to a backend: a model to load, an optimizer, a way to choose tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.models.config import Dtype
from phi3_lora.models.weights import ModelFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimSpec:
    """The optimizer of the adapter."""

    name: str = "adamw"
    """adamw: decoupled decay and bias correction, equal to torch.optim.AdamW. sgd: no momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 turns clipping off."""
    lr_ratio: float = 1.0
    """Learning rate of every B divided by the learning rate of the other arrays (LoRA+)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRequest:
    """Everything a backend needs to open a model for training or scoring."""

    model: ModelFiles
    dtype: str = "auto"
    """float32, bfloat16, float16 or auto. auto is gpu_dtype on a GPU and float32 on a CPU."""
    gpu_dtype: Dtype | None = None
    """The dtype that auto stands for on a GPU; None is the dtype of the model folder."""
    device: str = "auto"
    """auto, cpu or gpu."""
    quantize: str = "none"
    """Quantisation that the backend makes while loading: none, nf4 or mlx-affine.

    Use none for a folder whose weights are stored on a shared grid already.
    """
    lora: LoraSpec | None = None
    """None opens the bare base model."""
    optim: OptimSpec = field(default_factory=OptimSpec)
    seed: int = 0
    micro_batch_tokens: int = 8192
    """Most tokens in a micro-batch; a longer document is a micro-batch alone."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile the layers where this makes the backend faster; it takes about a minute."""

    def compute_dtype(self, *, on_gpu: bool) -> str:
        """Return the dtype to compute in, with auto resolved for the chosen device."""
        if self.dtype != "auto":
            return self.dtype
        return (self.gpu_dtype or self.model.config.dtype) if on_gpu else "float32"

    def unused_precision(self, dtype: str) -> list[str]:
        """Return a note if bf16 or fp16 was requested and the engine computes in another dtype."""
        if self.gpu_dtype in (None, dtype):
            return []
        return [f"bf16 and fp16 have no effect here: computing in {dtype}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Settings that choose the next token and end an answer."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the largest logit (greedy)."""
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
