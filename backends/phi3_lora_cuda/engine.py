"""The PyTorch engine: optimizer steps, scores, generation, and numpy arrays for the core."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi3_lora.adapters.initialization import trained_masks
from phi3_lora.adapters.names import is_b
from phi3_lora.arrays import Float32, Int32, Tensors
from phi3_lora.engine.batching import micro_batches
from phi3_lora.engine.decoding import PrefixCache, decode
from phi3_lora.engine.dropout import row_keys
from phi3_lora.engine.memory import out_of_memory_advice, process_peak_bytes
from phi3_lora.engine.protocol import Batch, Scores, StepResult
from phi3_lora.engine.request import LoadRequest, Sampling
from phi3_lora.engine.rope import rotary_tables
from phi3_lora.engine.scoring import (
    RowScores,
    forgetting_prefixes,
    score_documents,
    target_logprobs,
)
from phi3_lora.errors import TrainingError
from phi3_lora_cuda.decoder import CachedDecoder
from phi3_lora_cuda.documents import Documents, KeyValues
from phi3_lora_cuda.head import Head, head_loss, head_scores
from phi3_lora_cuda.model import LoadedPhi3

_MOMENTS = ("exp_avg", "exp_avg_sq")


class CudaEngine:
    """transformers' Phi-3 with PEFT's LoRA layers and torch's optimizer."""

    rank = 0
    world_size = 1

    def __init__(self, model: LoadedPhi3, request: LoadRequest, device: torch.device) -> None:
        self._model = model
        self._request = request
        self._device = device
        self._parameters = model.trained_parameters()
        spec = request.lora
        masks = {} if spec is None else trained_masks(spec, self.lora_shapes)
        self._masks = {name: torch.from_numpy(mask).to(device) for name, mask in masks.items()}
        self._optimizer = self._make_optimizer() if self._parameters else None
        self._decoder = CachedDecoder(model, device)
        self._prefixes: PrefixCache[KeyValues] = PrefixCache()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        optim = self._request.optim
        slow = [p for name, p in self._parameters.items() if not is_b(name)]
        fast = [p for name, p in self._parameters.items() if is_b(name)]
        # train_step sets the learning rate of each step.
        parameters = [
            {"params": group, "ratio": ratio}
            for group, ratio in ((slow, 1.0), (fast, optim.lr_ratio))
            if group
        ]
        if optim.name == "sgd":
            return torch.optim.SGD(parameters, lr=0.0, weight_decay=optim.weight_decay)
        return torch.optim.AdamW(
            parameters,
            lr=0.0,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )

    @property
    def notes(self) -> list[str]:
        """Messages on the options of the request that have no effect here."""
        notes = self._request.unused_precision(self.dtype)
        if self._request.compile and not self._model.is_compiled:
            notes.append(
                "torch_compile has no effect: it needs an NVIDIA GPU, bfloat16 or float16, Triton, "
                "a C compiler, a base that is not quantised, and no DoRA"
            )
        return notes

    @property
    def lora_shapes(self) -> Mapping[str, tuple[int, int]]:
        """Module path -> (out, in) of each LoRA layer."""
        return {path: self._model.config.adaptable_shapes()[path] for path in self._model.layers}

    @property
    def device_name(self) -> str:
        """The GPU's name, or cpu."""
        return torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"

    @property
    def dtype(self) -> str:
        """The base model's compute dtype."""
        return str(self._model.dtype).removeprefix("torch.")

    def _hidden(self, batch: Batch) -> Tensor:
        """Compute the final hidden states of a batch's tokens, (T, hidden)."""
        self._model.rotary.set_tables(
            *rotary_tables(self._model.config, batch.doc_starts), self._device
        )
        tokens = torch.from_numpy(batch.tokens).to(self._device, torch.long)[None]
        # The signature needs positions, but GivenRotary ignores them.
        positions = torch.zeros_like(tokens)
        out = self._model.causal_lm.model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            documents=Documents(batch.doc_starts, self._device, self._model.dtype),
        )
        return out.last_hidden_state[0]

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return positions and targets of the supervised tokens, each (S,)."""
        rows = np.flatnonzero(batch.loss_mask)
        index = torch.from_numpy(rows).to(self._device)
        return index, torch.from_numpy(batch.targets[rows]).to(self._device, torch.long)

    def _dropout_keys(self, batch: Batch, step: int) -> np.ndarray | None:
        """Return the dropout keys of a batch's tokens, (T,); None without dropout."""
        if self._request.lora is None or self._request.lora.dropout == 0:
            return None
        return row_keys(batch, seed=self._request.seed, step=step)

    def _set_dropout(self, keys: np.ndarray | None) -> None:
        if keys is not None:
            self._model.dropout_keys.set(keys, self._device)

    @contextlib.contextmanager
    def _dropping(self, keys: np.ndarray | None) -> Iterator[None]:
        """Enter a context for one forward and backward pass with these dropout keys."""
        self._set_dropout(keys)
        try:
            yield
        finally:
            self._model.dropout_keys.forget()

    def _head(self, keys: np.ndarray | None = None, index: Tensor | None = None) -> Head:
        """Return the head; it uses the dropout keys of the rows that it receives."""
        chosen = None if keys is None or index is None else keys[index.cpu().numpy()]

        def head(rows: Tensor, part: slice) -> Tensor:
            self._set_dropout(None if chosen is None else chosen[part])
            return self._model.head(rows)

        return head

    def _backward(self, batch: Batch, *, loss_tokens: int, step: int) -> Tensor:
        """Add the gradients of sum(nats) / loss_tokens and return sum(nats)."""
        self._model.causal_lm.train()
        vocab_size = self._model.config.vocab_size
        nats = torch.zeros((), dtype=torch.float64, device=self._device)
        for part in micro_batches(batch, self._request.micro_batch_tokens):
            keys = self._dropout_keys(part, step)
            index, targets = self._rows(part)
            if not len(index):
                continue
            with self._memory_faults(), self._model.compiled(), self._dropping(keys):
                hidden = self._hidden(part).index_select(0, index)
                loss = head_loss(hidden.detach(), self._head(keys, index), targets, vocab_size)
                # With gradient checkpointing, backward runs the layers again, on all rows.
                self._set_dropout(keys)
                # If only the head trains, the layers below it need no gradient.
                if hidden.requires_grad:
                    hidden.backward(loss.grad)
            nats += loss.nats
        for name, mask in self._masks.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                gradient.mul_(mask)
        # Divided last and in float32: in half precision, the mean of a large step would vanish.
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, float(loss_tokens))
        return nats

    def train_step(self, batch: Batch, *, loss_tokens: int, lr: float, step: int) -> StepResult:
        """Take one optimizer step."""
        assert self._optimizer is not None
        self._forget_prefixes()
        self._optimizer.zero_grad(set_to_none=True)
        nats = self._backward(batch, loss_tokens=loss_tokens, step=step)
        limit = self._request.optim.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), limit)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(step - 1)
        before = {name: self._parameters[name].detach().clone() for name in self._masks}
        self._optimizer.step()
        with torch.no_grad():
            # Weight decay also shrinks elements whose gradient is masked; restore them.
            for name, mask in self._masks.items():
                parameter = self._parameters[name]
                parameter.copy_(torch.where(mask, parameter, before[name]))
        return StepResult(nats / loss_tokens, norm)

    def computed_tokens(self, lengths: NDArray[np.int64]) -> int:
        """Return the sum of the lengths: documents are laid end to end, without padding."""
        return int(lengths.sum())

    def gradients(self, batch: Batch, *, loss_tokens: int, step: int = 0) -> Tensors:
        """Return the gradients under PEFT names; update nothing."""
        for parameter in self._parameters.values():
            parameter.grad = None
        self._backward(batch, loss_tokens=loss_tokens, step=step)
        return {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).float().cpu().numpy()
            for name, p in self._parameters.items()
        }

    @contextlib.contextmanager
    def _memory_faults(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as cause:
            raise TrainingError(out_of_memory_advice(self._request)) from cause

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        self._model.causal_lm.eval()
        with torch.no_grad(), self._model.uncompiled(), self._memory_faults():
            yield

    def _score_rows(self, batch: Batch, rows: NDArray[np.int64]) -> RowScores:
        with self._inference():
            index = torch.from_numpy(rows).to(self._device)
            targets = torch.from_numpy(batch.targets[rows]).to(self._device, torch.long)
            hidden = self._hidden(batch)[index]
            return head_scores(hidden, self._head(), targets, self._model.config.vocab_size)

    def score(self, batch: Batch) -> Scores:
        """Score each document's supervised tokens."""
        limit = self._request.micro_batch_tokens
        return score_documents(self._score_rows, batch, max_tokens=limit)

    def logprobs(self, batch: Batch) -> Float32:
        """Return the log-probability of each target, (T,)."""
        limit = self._request.micro_batch_tokens
        return target_logprobs(self._score_rows, batch, max_tokens=limit)

    def logits(self, batch: Batch, rows: Int32) -> Float32:
        """Return the logits at the chosen positions, (len(rows), vocabulary)."""
        with self._inference():
            index = torch.from_numpy(np.asarray(rows, np.int64)).to(self._device)
            hidden = self._hidden(batch)[index]
            return np.asarray(self._model.head(hidden).float().cpu().numpy())

    def base_only(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that turns the adapter off."""
        return forgetting_prefixes(self._model.base_only(), self._forget_prefixes)

    def _forget_prefixes(self) -> None:
        self._prefixes = PrefixCache()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        """Generate answers to all prompts together; yield index of a prompt and its next id."""
        # The decoder sets eval mode and turns gradients off in each pass: between two tokens the
        # caller may take a training step, and a context here would stay open.
        with self._memory_faults():
            yield from decode(
                self._decoder,
                self._model.config,
                prompts,
                sampling,
                prefixes=self._prefixes,
                max_tokens=self._request.micro_batch_tokens,
            )

    def read_adapter(self) -> Tensors:
        """Return the adapter in float32 under PEFT names."""
        return {n: p.detach().float().cpu().numpy().copy() for n, p in self._parameters.items()}

    def write_adapter(self, weights: Tensors) -> None:
        """Replace the adapter."""
        assert weights.keys() == self._parameters.keys(), "not this adapter's tensors"
        self._forget_prefixes()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(weights[name].copy()))

    def read_optimizer(self) -> Tensors:
        """Return the optimizer's moments under the adapter's names."""
        if self._optimizer is None:
            return {}
        found = {}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            for moment in _MOMENTS:
                if moment in state:
                    found[f"{name}.{moment}"] = state[moment].float().cpu().numpy().copy()
        return found

    def write_optimizer(self, state: Tensors) -> None:
        """Replace the moments; train_step sets the number of the step."""
        assert self._optimizer is not None
        self._optimizer.state.clear()
        if not state:
            return
        for name, parameter in self._parameters.items():
            moments = {m: torch.from_numpy(state[f"{name}.{m}"].copy()) for m in _MOMENTS}
            on_device = {m: value.to(self._device) for m, value in moments.items()}
            self._optimizer.state[parameter] = {"step": torch.zeros(()), **on_device}

    def peak_memory_bytes(self) -> int:
        """Return the peak memory: PyTorch's allocations on a GPU, the process on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return process_peak_bytes()

    def close(self) -> None:
        """Free the model."""
        self._parameters, self._optimizer = {}, None
        self._forget_prefixes()
        del self._model, self._decoder
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
