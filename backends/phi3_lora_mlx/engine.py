"""The MLX engine: optimizer steps, scores, generation, and numpy arrays for the core."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

from phi3_lora.adapters.initialization import trained_masks
from phi3_lora.adapters.names import is_b, lora_a_name, lora_b_name, magnitude_name, saved_name
from phi3_lora.arrays import Float32, Int32, Tensors
from phi3_lora.engine.batching import micro_batch_documents, micro_batches
from phi3_lora.engine.decoding import PrefixCache, decode
from phi3_lora.engine.memory import out_of_memory_advice, process_peak_bytes
from phi3_lora.engine.protocol import Batch, Scores, StepResult
from phi3_lora.engine.request import LoadRequest, Sampling
from phi3_lora.engine.scoring import (
    RowScores,
    forgetting_prefixes,
    score_documents,
    target_logprobs,
)
from phi3_lora.errors import TrainingError
from phi3_lora_mlx.decoder import CachedDecoder, KeyValues
from phi3_lora_mlx.head import head_loss, head_scores
from phi3_lora_mlx.layout import (
    DropoutKey,
    Rows,
    padded_length,
    padded_rows,
    part_tokens,
    ragged_rows,
)
from phi3_lora_mlx.model import LoadedPhi3, trainable
from phi3_lora_mlx.numerics import staged_sum
from phi3_lora_mlx.optimizer import Optimizer

Arrays = dict[str, mx.array]
P = ParamSpec("P")
R = TypeVar("R")


def _on_device(
    method: Callable[Concatenate[MlxEngine, P], R],
) -> Callable[Concatenate[MlxEngine, P], R]:
    """Run a method on the engine's device; the default device of the process does not change."""

    @wraps(method)
    def run(self: MlxEngine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with mx.stream(self._loaded.device):
            return method(self, *args, **kwargs)

    return run


class MlxEngine:
    """Phi-3 in MLX with LoRA layers and our own optimizer."""

    rank = 0
    world_size = 1

    def __init__(self, loaded: LoadedPhi3, request: LoadRequest, *, on_gpu: bool) -> None:
        """Make an engine for a loaded model.

        Args:
            loaded: the model.
            request: the request that the model was loaded for.
            on_gpu: use the padded layout and compile; this works on a CPU too, for tests.
        """
        self._loaded = loaded
        self._request = request
        self._on_gpu = on_gpu
        self._part_tokens = part_tokens(request.micro_batch_tokens, is_padded=on_gpu)
        self._parameters = trainable(loaded.model)
        step = mx.value_and_grad(self._surrogate)
        self._value_and_grad = mx.compile(step) if on_gpu else step
        self._decoder = CachedDecoder(loaded)
        self._prefixes: PrefixCache[KeyValues] = PrefixCache()
        # MLX name of each array -> PEFT name; the two are transposes of each other.
        self._names = {name: _peft_name(name) for name in self._parameters}
        self._head_names = [name for name in self._parameters if name.startswith("lm_head.")]
        spec = request.lora
        masks = {} if spec is None else trained_masks(spec, self.lora_shapes)
        with mx.stream(loaded.device):
            self._masks = {
                name: mx.array(np.ascontiguousarray(masks[peft].T))
                for name, peft in self._names.items()
                if peft in masks
            }
        self._optimizer = Optimizer(
            request.optim,
            is_compiled=on_gpu,
            masks=self._masks,
            fast={name for name, peft in self._names.items() if is_b(peft)},
        )

    @property
    def notes(self) -> list[str]:
        """Messages on the options of the request that have no effect here."""
        notes = self._request.unused_precision(self.dtype)
        if self._request.compile:
            notes.append("torch_compile has no effect: MLX compiles every step on a GPU by itself")
        return notes

    @property
    def lora_shapes(self) -> Mapping[str, tuple[int, int]]:
        """Module path -> (out, in) of each LoRA layer."""
        shapes = self._loaded.config.adaptable_shapes()
        return {path: shapes[path] for path in self._loaded.layers}

    @property
    def device_name(self) -> str:
        """The GPU's name, or cpu."""
        if not self._on_gpu:
            return "cpu"
        return str(mx.device_info(self._loaded.device).get("device_name", "gpu"))

    @property
    def dtype(self) -> str:
        """The base model's compute dtype."""
        return self._loaded.dtype

    def _surrogate(self, parameters: Arrays, rows: Rows) -> tuple[mx.array, mx.array]:
        """Return a number that has the gradient of nats, and nats.

        head_loss computes the gradients of the head's input and of the head's own arrays. The
        number is the sum of each of these arrays times its gradient. MLX takes only the number's
        gradient and never computes its value.
        """
        model = self._loaded.model
        model.update(tree_unflatten(list(parameters.items())))
        self._loaded.state.dropout_rows = rows.dropout_rows
        hidden = model(rows.tokens, rows.angles, rows.attention)[rows.select]
        own = {name: parameters[name] for name in self._head_names}
        loss = head_loss(
            partial(self._head, rows),
            {name: mx.stop_gradient(value) for name, value in own.items()},
            mx.stop_gradient(hidden),
            rows.targets,
            rows.weights,
            self._loaded.config.vocab_size,
        )
        product = hidden.astype(mx.float32) * mx.stop_gradient(loss.grad).astype(mx.float32)
        surrogate = product.sum()
        for name, value in own.items():
            surrogate = surrogate + (value * mx.stop_gradient(loss.head_grads[name])).sum()
        return surrogate, loss.nats

    def _head(self, rows: Rows, own: Arrays, hidden: mx.array, part: slice) -> mx.array:
        """Compute logits of some supervised rows with the given arrays of the head."""
        model, state = self._loaded.model, self._loaded.state
        if own:
            model.update(tree_unflatten(list(own.items())))
        if rows.dropout_rows is not None:
            state.dropout_rows = rows.dropout_rows[rows.select][part]
        logits = model.head(hidden)
        state.dropout_rows = rows.dropout_rows
        return logits

    def _rows(self, batch: Batch, dropout: DropoutKey | None = None) -> Rows:
        make = padded_rows if self._on_gpu else ragged_rows
        return make(batch, self._loaded.config, dropout)

    def _backward(self, batch: Batch, *, loss_tokens: int, step: int) -> tuple[Arrays, mx.array]:
        """Return the gradients of sum(nats) / loss_tokens, and sum(nats)."""
        request = self._request
        has_dropout = request.lora is not None and request.lora.dropout > 0
        key = DropoutKey(request.seed, step) if has_dropout else None
        gradients: Arrays = {}
        nats = []
        for part in micro_batches(batch, self._part_tokens):
            if not part.loss_mask.any():
                continue
            with self._memory_faults(), self._trace():
                (_, part_nats), part_gradients = self._value_and_grad(
                    self._parameters, self._rows(part, key)
                )
            gradients = (
                {n: g + part_gradients[n] for n, g in gradients.items()}
                if gradients
                else part_gradients
            )
            nats.append(part_nats)
            # Free this micro-batch's activations before the next one.
            with self._memory_faults():
                mx.eval(gradients, part_nats)
        if not gradients:
            return {n: mx.zeros_like(p) for n, p in self._parameters.items()}, mx.array(0.0)
        # Divided last and in float32: in half precision, the mean of a large step would vanish.
        gradients = {name: g / loss_tokens for name, g in gradients.items()}
        gradients |= {name: gradients[name] * mask for name, mask in self._masks.items()}
        return gradients, staged_sum(mx.stack(nats))

    @contextlib.contextmanager
    def _trace(self) -> Iterator[None]:
        """Enter a context for a forward and backward pass.

        The pass leaves traced arrays in the model. The end of the context puts the parameters back,
        also after a pass that failed.
        """
        state = self._loaded.state
        state.is_tracing = True
        try:
            yield
        finally:
            state.is_tracing = False
            state.dropout_rows = None
            self._install(self._parameters)

    def _install(self, parameters: Arrays) -> None:
        self._loaded.model.update(tree_unflatten(list(parameters.items())))
        self._parameters = parameters

    @_on_device
    def train_step(self, batch: Batch, *, loss_tokens: int, lr: float, step: int) -> StepResult:
        """Take one optimizer step."""
        self._forget_prefixes()
        gradients, nats = self._backward(batch, loss_tokens=loss_tokens, step=step)
        optimizer = self._optimizer
        before = optimizer.exp_avg, optimizer.exp_avg_sq
        loss = nats / loss_tokens
        try:
            new, norm = optimizer.step(self._parameters, gradients, lr=lr, step=step)
            with self._memory_faults():
                mx.async_eval(loss, norm, new, optimizer.exp_avg, optimizer.exp_avg_sq)
        except Exception:
            optimizer.exp_avg, optimizer.exp_avg_sq = before
            raise
        self._install(new)
        return StepResult(_Deferred(loss), _Deferred(norm))

    def computed_tokens(self, lengths: NDArray[np.int64]) -> int:
        """Return the tokens that a step computes, with padding."""
        if not self._on_gpu:
            return int(lengths.sum())
        parts = micro_batch_documents(lengths, self._part_tokens)
        return sum(padded_length(int(lengths[part].sum())) for part in parts)

    @_on_device
    def gradients(self, batch: Batch, *, loss_tokens: int, step: int = 0) -> Tensors:
        """Return the gradients under PEFT names; update nothing."""
        gradients, _ = self._backward(batch, loss_tokens=loss_tokens, step=step)
        return self._to_peft(gradients)

    @contextlib.contextmanager
    def _memory_faults(self) -> Iterator[None]:
        """Turn MLX's error for a full memory, known only by its text, into a TrainingError."""
        try:
            yield
        except RuntimeError as cause:
            if not any(word in str(cause).lower() for word in ("alloc", "insufficient memory")):
                raise
            raise TrainingError(out_of_memory_advice(self._request)) from cause

    def _hidden(self, batch: Batch, select: np.ndarray) -> mx.array:
        """Compute the final hidden states at chosen positions, (len(select), hidden)."""
        rows = self._rows(batch)
        return self._loaded.model(rows.tokens, rows.angles, rows.attention)[mx.array(select)]

    def _score_rows(self, batch: Batch, rows: NDArray[np.int64]) -> RowScores:
        with self._memory_faults():
            hidden = self._hidden(batch, rows)
            targets = mx.array(batch.targets[rows])
            return head_scores(self._loaded.model, hidden, targets, self._loaded.config.vocab_size)

    @_on_device
    def score(self, batch: Batch) -> Scores:
        """Score each document's supervised tokens."""
        return score_documents(self._score_rows, batch, max_tokens=self._part_tokens)

    @_on_device
    def logprobs(self, batch: Batch) -> Float32:
        """Return the log-probability of each target, (T,)."""
        return target_logprobs(self._score_rows, batch, max_tokens=self._part_tokens)

    @_on_device
    def logits(self, batch: Batch, rows: Int32) -> Float32:
        """Return the logits at the chosen positions, (len(rows), vocabulary)."""
        with self._memory_faults():
            hidden = self._hidden(batch, np.asarray(rows))
            return np.array(self._loaded.model.head(hidden).astype(mx.float32))

    def base_only(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that turns the adapter off."""
        return forgetting_prefixes(self._loaded.base_only(), self._forget_prefixes)

    def _forget_prefixes(self) -> None:
        self._prefixes = PrefixCache()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        """Generate answers to all prompts together; yield index of a prompt and its next id."""
        with self._memory_faults():
            yield from decode(
                self._decoder,
                self._loaded.config,
                prompts,
                sampling,
                prefixes=self._prefixes,
                max_tokens=self._request.micro_batch_tokens,
            )

    def _to_peft(self, arrays: Arrays) -> Tensors:
        return {
            self._names[name]: _turned(name, np.array(value.astype(mx.float32)))
            for name, value in arrays.items()
        }

    def _from_peft(self, weights: Tensors, suffix: str = "") -> Arrays:
        return {
            name: mx.array(_turned(name, weights[peft + suffix]))
            for name, peft in self._names.items()
        }

    @_on_device
    def read_adapter(self) -> Tensors:
        """Return the adapter in float32 under PEFT names."""
        return self._to_peft(self._parameters)

    @_on_device
    def write_adapter(self, weights: Tensors) -> None:
        """Replace the adapter."""
        assert weights.keys() == set(self._names.values()), "not this adapter's tensors"
        self._forget_prefixes()
        self._install(self._from_peft(weights))

    @_on_device
    def read_optimizer(self) -> Tensors:
        """Return the optimizer's moments under the adapter's names."""
        moments = {"exp_avg": self._optimizer.exp_avg, "exp_avg_sq": self._optimizer.exp_avg_sq}
        return {
            f"{name}.{moment}": value
            for moment, arrays in moments.items()
            for name, value in self._to_peft(arrays).items()
        }

    @_on_device
    def write_optimizer(self, state: Tensors) -> None:
        """Replace the moments; train_step receives the number of the step."""
        self._optimizer.exp_avg = self._from_peft(state, ".exp_avg") if state else {}
        self._optimizer.exp_avg_sq = self._from_peft(state, ".exp_avg_sq") if state else {}

    def peak_memory_bytes(self) -> int:
        """Return the peak memory: MLX's arrays on a GPU, the process on a CPU."""
        if self._on_gpu:
            return int(mx.get_peak_memory())
        return process_peak_bytes()

    def close(self) -> None:
        """Free the model."""
        self._parameters = {}
        self._forget_prefixes()
        del self._loaded, self._value_and_grad, self._decoder
        mx.clear_cache()


def _peft_name(name: str) -> str:
    """Return PEFT's name of a trainable array."""
    module, _, kind = name.rpartition(".")
    names = {"lora_a": lora_a_name, "lora_b": lora_b_name, "m": magnitude_name}
    return names.get(kind, saved_name)(module)


def _turned(name: str, value: np.ndarray) -> np.ndarray:
    """Convert between MLX's and PEFT's orientation: transpose A and B, but not whole weights."""
    return np.ascontiguousarray(value.T if name.endswith((".lora_a", ".lora_b")) else value)


class _Deferred:
    """A number that the device still computes; float() waits for it."""

    def __init__(self, value: mx.array) -> None:
        self._value = value

    def __float__(self) -> float:
        return float(self._value.item())  # type: ignore[arg-type]
