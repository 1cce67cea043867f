"""Settings of the training (`training_config`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from phi3_lora.config.require import require
from phi3_lora.engine.request import OptimSpec

Strategy = Literal["no", "steps", "epoch"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Optimizer = Literal["adamw", "adamw_torch", "adamw_torch_fused", "sgd"]
OPTIMIZERS: dict[Optimizer, str] = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "sgd": "sgd",
}
"""Accepted name -> update rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Settings of the training (`training_config`)."""

    learning_rate: float = 2e-4
    """Largest learning rate of the schedule."""
    num_train_epochs: float = 1.0
    """Passes over the training data; used when max_steps is not positive."""
    max_steps: int = -1
    """Optimizer steps; a positive number wins over num_train_epochs."""
    per_device_train_batch_size: int = 4
    """Documents (with packing: rows) of a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step. The product of both is the documents of a step, on any
    number of ranks."""
    lr_scheduler_type: Scheduler = "cosine"
    """linear, cosine, constant or constant_with_warmup."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    warmup_steps: int = 0
    """Steps of warm-up; a positive number wins over warmup_ratio."""
    optim: Optimizer = "adamw_torch"
    """adamw_torch (also adamw, adamw_torch_fused) or sgd."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapter."""
    max_grad_norm: float = 1.0
    """Largest global norm of the gradients; larger gradients are scaled down. 0 turns this off."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of B divided by that of A (LoRA+); 1 turns LoRA+ off."""
    max_length: int = 2048
    """Tokens that a document may have; data.too_long decides on longer ones."""
    packing: bool = False
    """Fill rows of max_length tokens with as many whole documents as fit."""
    seed: int = 0
    """Seed of the adapter's first weights, the order of documents, and dropout."""
    logging_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_strategy: Strategy = "epoch"
    """When to evaluate on the validation data: no, steps or epoch; the last two also at the end."""
    eval_steps: int = 0
    """Steps between two evaluations; a positive number turns eval_strategy epoch into steps."""
    save_strategy: Strategy = "steps"
    """When to save a checkpoint: no, steps or epoch; the last step always saves one."""
    save_steps: int = 100
    """Steps between two checkpoints."""
    save_total_limit: int = 2
    """Number of checkpoints to keep; 0 keeps all."""
    bf16: bool = False
    """Compute in bfloat16 on a GPU."""
    fp16: bool = False
    """Compute in float16 on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    torch_compile: bool = False
    """Fuse each layer's small operations, on CUDA in half precision; compiling takes a minute."""

    def __post_init__(self) -> None:
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            require(
                math.isfinite(value) and value >= smallest,
                f"training_config.{name} must be >= {smallest}, got {value}",
            )
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            require(
                value in allowed,
                f"training_config.{name} must be one of {', '.join(allowed)}; got {value!r}",
            )
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"training_config.{name} must be in [0, 1), got {value}")
        require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"learning_rate must be > 0 and finite, got {self.learning_rate} (--lr)",
        )
        require(
            self.max_steps == -1 or 0 < self.max_steps <= _MOST_STEPS,
            f"max_steps must be -1 (num_train_epochs decides) or 1 to {_MOST_STEPS:,}, got "
            f"{self.max_steps}",
        )
        require(
            self.max_steps > 0 or 0 < self.num_train_epochs < math.inf,
            f"nothing to do: max_steps is {self.max_steps} and num_train_epochs is "
            f"{self.num_train_epochs}; one must be > 0",
        )
        require(not (self.bf16 and self.fp16), "bf16 and fp16 cannot both be true")
        if self.eval_steps > 0 and self.eval_strategy == "epoch":
            object.__setattr__(self, "eval_strategy", "steps")

    @property
    def documents_per_step(self) -> int:
        """Documents (with packing: rows) of an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def optim_spec(self) -> OptimSpec:
        """The optimizer settings that a backend needs."""
        return OptimSpec(
            name=OPTIMIZERS[self.optim],
            betas=(self.adam_beta1, self.adam_beta2),
            eps=self.adam_epsilon,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            lr_ratio=self.loraplus_lr_ratio,
        )

    def num_warmup_steps(self, total_steps: int) -> int:
        """Return the steps of warm-up in a run of this many steps."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)


_MOST_STEPS = 100_000_000


_SMALLEST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "adam_epsilon": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "loraplus_lr_ratio": 1e-6,
    "max_length": 2,
    "seed": 0,
    "logging_steps": 1,
    "eval_steps": 0,
    "save_steps": 1,
    "save_total_limit": 0,
}


_CHOICES: dict[str, tuple[str, ...]] = {
    "lr_scheduler_type": get_args(Scheduler),
    "optim": get_args(Optimizer),
    "eval_strategy": get_args(Strategy),
    "save_strategy": get_args(Strategy),
}
