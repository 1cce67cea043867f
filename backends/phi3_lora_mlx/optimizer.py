"""AdamW and SGD on the adapter's arrays, with the formulas of torch.

Bias corrections are computed in Python's float64. MLX's own AdamW skips them by default, and
otherwise rounds 1 - beta2**t to float32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import mlx.core as mx

from phi3_lora.engine.request import OptimSpec
from phi3_lora_mlx.numerics import square_norm

Arrays = dict[str, mx.array]


class Optimizer:
    """An optimizer whose only state is its moments."""

    def __init__(
        self,
        spec: OptimSpec,
        *,
        is_compiled: bool,
        masks: Mapping[str, mx.array] | None = None,
        fast: Collection[str] = (),
    ) -> None:
        """Make an optimizer without moments.

        Args:
            spec: name and settings of the optimizer.
            is_compiled: whether to compile the update.
            masks: True where an array trains, by name, for arrays that train only in part.
            fast: names of the arrays whose learning rate is multiplied by lr_ratio.
        """
        self._spec = spec
        self._masks = masks or {}
        self._fast = frozenset(fast) if spec.lr_ratio != 1.0 else frozenset()
        self.exp_avg: Arrays = {}
        self.exp_avg_sq: Arrays = {}
        self._apply = mx.compile(self._update) if is_compiled else self._update

    def step(
        self, parameters: Arrays, gradients: Arrays, *, lr: float, step: int
    ) -> tuple[Arrays, mx.array]:
        """Return new parameters, and the global norm of the gradients before clipping.

        Args:
            parameters: the parameters, by name.
            gradients: the gradients, by name.
            lr: learning rate of this step.
            step: number of the step, from 1, for bias correction.
        """
        spec = self._spec
        if spec.name == "adamw" and not self.exp_avg:
            self.exp_avg = {name: mx.zeros_like(value) for name, value in parameters.items()}
            self.exp_avg_sq = {name: mx.zeros_like(value) for name, value in parameters.items()}
        beta1, beta2 = spec.betas
        scalars = {"root_correction": math.sqrt(1.0 - beta2**step)}
        for key, rate in (("", lr), ("fast_", lr * spec.lr_ratio)):
            scalars[f"{key}decay"] = 1.0 - rate * spec.weight_decay
            scalars[f"{key}step_size"] = rate / (1.0 - beta1**step)
            scalars[f"{key}lr"] = rate
        # As arrays: a compiled update would be traced again for each new Python number.
        inputs = {name: mx.array(value, mx.float32) for name, value in scalars.items()}
        new, self.exp_avg, self.exp_avg_sq, norm = self._apply(
            parameters, gradients, self.exp_avg, self.exp_avg_sq, inputs
        )
        return new, norm

    def _update(
        self, parameters: Arrays, gradients: Arrays, first: Arrays, second: Arrays, s: Arrays
    ) -> tuple[Arrays, Arrays, Arrays, mx.array]:
        spec = self._spec
        norm = mx.sqrt(mx.stack([square_norm(g) for g in gradients.values()]).sum())
        if spec.max_grad_norm:
            clip = mx.minimum(spec.max_grad_norm / (norm + 1e-6), 1.0)
            gradients = {name: g * clip for name, g in gradients.items()}
        if spec.name == "sgd":
            new = {
                name: p - s[self._key(name, "lr")] * (gradients[name] + spec.weight_decay * p)
                for name, p in parameters.items()
            }
            return self._masked(new, parameters), first, second, norm
        beta1, beta2 = spec.betas
        first = {n: m + (gradients[n] - m) * (1.0 - beta1) for n, m in first.items()}
        second = {n: beta2 * v + (1.0 - beta2) * gradients[n] ** 2 for n, v in second.items()}
        new = {}
        for name, p in parameters.items():
            denominator = mx.sqrt(second[name]) / s["root_correction"] + spec.eps
            decay, size = s[self._key(name, "decay")], s[self._key(name, "step_size")]
            new[name] = p * decay - size * (first[name] / denominator)
        return self._masked(new, parameters), first, second, norm

    def _key(self, name: str, scalar: str) -> str:
        return f"fast_{scalar}" if name in self._fast else scalar

    def _masked(self, new: Arrays, old: Arrays) -> Arrays:
        """Restore masked elements, which weight decay shrinks although they have no gradient."""
        kept = {name: mx.where(mask, new[name], old[name]) for name, mask in self._masks.items()}
        return {**new, **kept}
