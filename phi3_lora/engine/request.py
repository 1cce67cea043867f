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
    """adamw (decoupled decay, bias-corrected, as torch.optim.AdamW) or sgd (no momentum)."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 turns clipping off."""
    lr_ratio: float = 1.0
    """The rate of every B over that of the rest (LoRA+)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRequest:
    """Everything a backend needs to open a model for training or scoring."""

    model: ModelFiles
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: gpu_dtype on a GPU, float32 on a CPU."""
    gpu_dtype: Dtype | None = None
    """The dtype that auto stands for on a GPU; None is the model's own."""
    device: str = "auto"
    """auto, cpu or gpu."""
    quantize: str = "none"
    """none, or a quantisation that the backend makes while loading: nf4 or mlx-affine. A folder on
    a shared grid is loaded with none."""
    lora: LoraSpec | None = None
    """None opens the bare base model."""
    optim: OptimSpec = field(default_factory=OptimSpec)
    seed: int = 0
    micro_batch_tokens: int = 8192
    """A micro-batch holds at most this many tokens, or one longer document."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Fuse each layer's small operations where the backend gains by it, after a minute's work."""

    def compute_dtype(self, *, on_gpu: bool) -> str:
        """Return the dtype to compute in, with auto resolved for the chosen device."""
        if self.dtype != "auto":
            return self.dtype
        return (self.gpu_dtype or self.model.config.dtype) if on_gpu else "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The way to choose the next token."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
