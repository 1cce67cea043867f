"""loralib's Linear, Embedding and MergedLinear as mlx.nn modules: same names, shapes and scale.

Conv1d, Conv2d and Conv3d are left out, because Phi-3 has no convolution. A is (r, in) and B is
(out, r), as in loralib and PEFT. `phi3-lora train` uses the layers of lora.py instead.
Source: microsoft/LoRA, loralib 0.1.2, loralib/layers.py.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phi3_lora.errors import ConfigError


class LoRALayer(nn.Module):
    """Base of the layers: the scale alpha / r, and a delta that eval() merges into the weight."""

    weight: mx.array
    r: int
    lora_alpha: float
    scaling: float
    merge_weights: bool
    merged: bool
    """True while `weight` contains the delta."""

    def _set_scale(self, r: int, lora_alpha: float, merge_weights: bool) -> None:
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise ConfigError(
                f"r must be a whole number >= 0, got {r!r}; 0 is a layer without LoRA"
            )
        if not isinstance(lora_alpha, int | float) or not 0 < lora_alpha < math.inf:
            raise ConfigError(
                f"lora_alpha must be a number above 0, got {lora_alpha!r}; the delta is scaled by "
                "lora_alpha / r, and lora_alpha = r leaves it as it is"
            )
        self.r, self.lora_alpha = r, lora_alpha
        self.scaling = lora_alpha / r if r else 0.0
        self.merge_weights, self.merged = merge_weights, False

    @property
    def has_lora(self) -> bool:
        """True if the layer has A and B."""
        return "lora_A" in self

    @abstractmethod
    def delta(self) -> mx.array:
        """Return the delta that merging adds to `weight`, with the shape of `weight`."""

    def merge(self) -> None:
        """Add the delta to `weight`, if this is not done yet.

        A copy of the old weight is kept until unmerge(). loralib subtracts the delta instead; in
        half precision this does not give the old weight back. The copy needs the weight's memory
        once more. With merge_weights=False, eval() does not merge.
        """
        if self.merged or not self.has_lora:
            return
        weight = self.weight
        self._unmerged_weight = weight
        self.weight = (weight + self.delta()).astype(weight.dtype)
        self.merged = True

    def unmerge(self) -> None:
        """Restore the `weight` from before merge(), bit for bit."""
        if not self.merged:
            return
        self.weight = self._unmerged_weight.astype(self.weight.dtype)
        del self._unmerged_weight
        self.merged = False

    def _set_training_mode(self, mode: bool) -> None:
        # Module.train and Module.eval call only this method on the layers of a model.
        super()._set_training_mode(mode)
        if mode and self.merge_weights:
            self.unmerge()
        elif self.merge_weights:
            self.merge()

    def to_quantized(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the layer by which mlx.nn.quantize replaces this one.

        Raises:
            ConfigError: when the layer has LoRA: MLX's quantised layer would drop A and B.
        """
        if self.has_lora:
            raise ConfigError(
                f"{type(self).__name__} with r = {self.r} cannot be quantised: its LoRA would be "
                "lost; pass mlx.nn.quantize a class_predicate that leaves it out, or train on a "
                "quantised base with phi3-lora train --quantize 4bit"
            )
        return super().to_quantized(*args, **kwargs)


class Embedding(LoRALayer, nn.Embedding):
    """weight[x] + scaling (B A[:, x])^T; A is (r, num_embeddings), B is (embedding_dim, r).

    A starts as zeros and B as N(0, 1), so the delta starts as zero.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self._set_scale(r, lora_alpha, merge_weights)
        if r > 0:
            self.lora_A = mx.zeros((r, num_embeddings))
            self.lora_B = mx.random.normal((embedding_dim, r))
            self.freeze(keys=["weight"], recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map ids x (...) to (..., embedding_dim), in the weight's dtype."""
        y = super().__call__(x)
        if self.merged or not self.has_lora:
            return y
        low = self.lora_A.T[x] @ self.lora_B.T
        return (y + self.scaling * low).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Map x (..., embedding_dim) to logits, for a head that is tied to this embedding.

        LoRA is included. A torch model with loralib reads only `weight` here, and so leaves LoRA
        out until it is merged.
        """
        y = super().as_linear(x)
        if self.merged or not self.has_lora:
            return y
        low = x @ (self.scaling * self.lora_B).astype(x.dtype)
        return mx.addmm(y, low, self.lora_A.astype(x.dtype))

    def delta(self) -> mx.array:
        """Return the delta that merging adds to `weight`, (num_embeddings, embedding_dim)."""
        return self.scaling * (self.lora_B @ self.lora_A).T


@dataclass(frozen=True, slots=True)
class _Parts:
    """Parts of a layer's output: their sizes, and True for a part with LoRA."""

    sizes: tuple[int, ...]
    enabled: tuple[bool, ...]

    @property
    def num_enabled(self) -> int:
        return sum(self.enabled)

    @property
    def enabled_sizes(self) -> list[int]:
        return list(itertools.compress(self.sizes, self.enabled))


class _PartwiseLinear(LoRALayer, nn.Linear):
    """A linear layer with LoRA on some parts of its output; each part has an A and a B.

    lora_A (r * parts, in) stacks the A of the parts. lora_B (rows, r) stacks the B.
    """

    def __init__(
        self,
        in_features: int,
        parts: _Parts,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        fan_in_fan_out: bool,
        merge_weights: bool,
        bias: bool,
    ) -> None:
        super().__init__(in_features, sum(parts.sizes), bias=bias)
        self._set_scale(r, lora_alpha, merge_weights)
        if not 0 <= lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be from 0 to below 1, got {lora_dropout!r}")
        self._parts = parts
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight = self.weight.T
        if r == 0 or not parts.num_enabled:
            return
        # kaiming_uniform with a = sqrt(5) is U(-1 / sqrt(in), 1 / sqrt(in)).
        bound = in_features**-0.5
        self.lora_A = mx.random.uniform(-bound, bound, (r * parts.num_enabled, in_features))
        self.lora_B = mx.zeros((sum(parts.enabled_sizes), r))
        if lora_dropout > 0:
            self.lora_dropout = nn.Dropout(lora_dropout)
        self.freeze(keys=["weight"], recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., in) to (..., out)."""
        weight = self.weight if self.fan_in_fan_out else self.weight.T
        y = mx.addmm(self.bias, x, weight) if "bias" in self else x @ weight
        if self.merged or not self.has_lora:
            return y
        dropped = self.lora_dropout(x) if "lora_dropout" in self else x
        # One product with all A. A and B are small; they may be float32 while x is half precision.
        low = dropped @ self.lora_A.T.astype(x.dtype)
        scaled = (self.scaling * self.lora_B).astype(x.dtype)
        products = zip(*self._by_part(low, -1, scaled), strict=True)
        found = [
            mx.addmm(part, *next(products)) if enabled else part
            for part, enabled in zip(
                _cut(y, self._parts.sizes, axis=-1), self._parts.enabled, strict=True
            )
        ]
        return mx.concatenate(found, axis=-1) if len(found) > 1 else found[0]

    def delta(self) -> mx.array:
        """Return the delta that merging adds to `weight`: (out, in), transposed if fan_in_fan_out.

        Parts without LoRA are zero.
        """
        products = zip(*self._by_part(self.lora_A, 0, self.scaling * self.lora_B), strict=True)
        blocks = []
        for size, enabled in zip(self._parts.sizes, self._parts.enabled, strict=True):
            if enabled:
                a, b_transposed = next(products)
                blocks.append(b_transposed.T @ a)
            else:
                blocks.append(mx.zeros((size, self.lora_A.shape[1]), self.lora_A.dtype))
        delta = mx.concatenate(blocks, axis=0)
        return delta.T if self.fan_in_fan_out else delta

    def _by_part(
        self, stacked: mx.array, axis: int, b: mx.array
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Cut a stack with r rows or columns for each part, and B, into the parts' own.

        Args:
            stacked: an array whose axis `axis` has r entries for each part.
            axis: the axis to cut.
            b: (rows, r).

        Returns:
            The pieces of `stacked`, and the transposed B (r, rows of the part) of each part.
        """
        low = mx.split(stacked, self._parts.num_enabled, axis=axis)
        return list(low), [part.T for part in _cut(b, self._parts.enabled_sizes, axis=0)]


class Linear(_PartwiseLinear):
    """W x + bias + scaling B A dropout(x); A is (r, in_features), B is (out_features, r).

    Source: LoRA, arXiv 2106.09685, equation 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        bias: bool = True,
    ) -> None:
        """Make a layer with a random weight; load your own weight after that.

        Args:
            in_features: length of x.
            out_features: length of the output.
            r: the rank; 0 for a plain layer.
            lora_alpha: the delta is scaled by lora_alpha / r.
            lora_dropout: probability of dropout on the input of A, in training.
            fan_in_fan_out: True if `weight` is (in_features, out_features), as in GPT-2.
            merge_weights: True if eval() merges the delta into `weight` and train() removes it.
            bias: True for a layer with a bias.

        Raises:
            ConfigError: when r, lora_alpha or lora_dropout is out of range.
        """
        super().__init__(
            in_features,
            _Parts((out_features,), (True,)),
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            fan_in_fan_out=fan_in_fan_out,
            merge_weights=merge_weights,
            bias=bias,
        )


class MergedLinear(_PartwiseLinear):
    """A fused projection, for example q, k, v, with LoRA on some of its parts.

    A is (r * n, in_features) for n parts with LoRA, and B is (rows of these parts, r). By default,
    as in loralib, all parts have equal size. If a model has fewer key-value heads than heads
    (Phi-3-medium, Phi-4), equal parts are not q, k and v: pass `sizes` then.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        bias: bool = True,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """Make a layer with a random weight; load your own weight after that.

        Args:
            in_features: see Linear.
            out_features: length of the output, all parts together.
            r: the rank of each part.
            lora_alpha: see Linear.
            lora_dropout: see Linear.
            enable_lora: True for each part with LoRA.
            fan_in_fan_out: see Linear.
            merge_weights: see Linear.
            bias: see Linear.
            sizes: output length of each part; None for equal parts.

        Raises:
            ConfigError: when the sizes do not add up to out_features, or r, lora_alpha or
                lora_dropout is out of range.
        """
        super().__init__(
            in_features,
            _parts(out_features, enable_lora, sizes),
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            fan_in_fan_out=fan_in_fan_out,
            merge_weights=merge_weights,
            bias=bias,
        )

    @property
    def enable_lora(self) -> list[bool]:
        """True for each part with LoRA."""
        return list(self._parts.enabled)

    @property
    def sizes(self) -> list[int]:
        """Output length of each part."""
        return list(self._parts.sizes)


def _cut(x: mx.array, sizes: Sequence[int], axis: int) -> list[mx.array]:
    """Cut an array into parts of the given sizes."""
    return list(mx.split(x, list(itertools.accumulate(sizes))[:-1], axis=axis))


def _parts(out_features: int, enable_lora: Sequence[bool], sizes: Sequence[int] | None) -> _Parts:
    count = len(enable_lora)
    if sizes is None:
        if count == 0 or out_features % count:
            raise ConfigError(
                f"enable_lora has {count} parts, which do not divide out_features {out_features}; "
                "give sizes=[...] with the outputs of each part"
            )
        sizes = [out_features // count] * count
    if len(sizes) != count or min(sizes, default=0) < 1 or sum(sizes) != out_features:
        raise ConfigError(
            f"sizes must be {count} numbers above 0, one for each part of enable_lora, with the "
            f"sum out_features = {out_features}; got {list(sizes)}"
        )
    return _Parts(tuple(sizes), tuple(map(bool, enable_lora)))
