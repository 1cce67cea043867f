"""Settings of the adapter (`peft_config`)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from phi3_lora.config.require import require
from phi3_lora.engine.lora_spec import lora_scaling

Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Settings of the adapter (`peft_config`)."""

    r: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: float = 32.0
    """The delta is (lora_alpha / r) B A."""
    lora_dropout: float = 0.0
    """Probability that an input feature of a LoRA layer is zeroed in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Module names, full paths, one regular expression, or all-linear. q_proj, k_proj, v_proj,
    gate_proj and up_proj stand for their rows of the fused weights."""
    exclude_modules: str | tuple[str, ...] = ()
    """Modules among the targets that are not adapted; named as in target_modules."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the decoder layers to adapt, from 0; null adapts all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Module name or regular expression -> its own r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Module name or regular expression -> its own lora_alpha."""
    use_rslora: bool = False
    """Scale the delta by lora_alpha / sqrt(r) in place of lora_alpha / r."""
    use_dora: bool = False
    """Train the norm of each row of a weight apart from its direction (DoRA)."""
    bias: Bias = "none"
    """none, all or lora_only; without effect, because Phi-3 has no bias."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules whose whole weight is trained and saved in the adapter."""
    init_lora_weights: bool | str | None = True
    """true (B = 0), or pissa, pissa_niter_N or olora, which start from the base model's weights."""

    def __post_init__(self) -> None:
        require(self.r >= 1, f"peft_config.r must be >= 1, got {self.r} (--rank)")
        require(
            math.isfinite(self.lora_alpha) and self.lora_alpha > 0,
            f"peft_config.lora_alpha must be > 0, got {self.lora_alpha} (--alpha)",
        )
        require(
            0.0 <= self.lora_dropout < 1.0,
            f"peft_config.lora_dropout must be in [0, 1), got {self.lora_dropout} (--dropout)",
        )
        require(
            bool(self.target_modules),
            "peft_config.target_modules is empty: name modules, or all-linear (--targets)",
        )
        require(
            self.bias in get_args(Bias),
            f"peft_config.bias must be none, all or lora_only; got {self.bias!r}",
        )
        if self.init_lora_weights is None:
            object.__setattr__(self, "init_lora_weights", True)
        init = self.init_lora_weights
        require(
            init is True or bool(re.fullmatch(r"pissa|pissa_niter_\d{1,3}|olora", str(init))),
            "peft_config.init_lora_weights must be true, pissa, pissa_niter_N or olora; got "
            f"{init!r}",
        )
        for name in ("rank_pattern", "alpha_pattern"):
            bad = {k: v for k, v in getattr(self, name).items() if not 0 < v < math.inf}
            require(not bad, f"peft_config.{name} must hold numbers > 0, got {bad}")

    @property
    def scaling(self) -> float:
        """The factor of B A in the delta."""
        return lora_scaling(self.lora_alpha, self.r, use_rslora=self.use_rslora)
