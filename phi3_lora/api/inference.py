"""Functions that load a model: load, evaluate and generate."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.api.models import (
    EvaluationOptions,
    EvaluationResult,
    LoadedModel,
    Progress,
    rows_to_score,
)
from phi3_lora.api.options import AnyPath, ModelOptions, Note, log_note
from phi3_lora.config.schema import Device, DtypeOption
from phi3_lora.data.options import LossOn, OnBadRow
from phi3_lora.data.rows.conversation import Message
from phi3_lora.data.sources.in_memory import Data
from phi3_lora.engine.request import Sampling
from phi3_lora.inference import generation
from phi3_lora.inference.base_model import FoundModel, find_base_model
from phi3_lora.inference.generation import Generation, Prompt
from phi3_lora.inference.loading import Placement, open_engine, with_adapter
from phi3_lora.models.config import Quantization


@dataclass(frozen=True, slots=True)
class ModelToOpen:
    """A base model and an adapter, both found and checked but not loaded."""

    base: FoundModel
    adapter: Adapter | None
    placement: Placement
    note: Note

    def open(self) -> LoadedModel:
        """Load the model.

        Raises:
            BackendUnavailableError: when the backend or device is missing.
            ModelError: when the weights cannot be used.
        """
        opened = open_engine(self.base, self.adapter, self.placement, self.note)
        return LoadedModel(self.base, opened.engine, self.adapter, self.note)


def find_model(model: str, **options: Unpack[ModelOptions]) -> ModelToOpen:
    """Find a base model and an adapter, and check that the adapter fits.

    Args:
        model: a folder, a hub id, or demo.
        options: the options of load, with the same defaults.

    Raises:
        AdapterError: when the adapter is damaged or does not fit.
        ModelError: when the base model cannot be used.
    """
    quantize, adapter = options.get("quantize", "none"), options.get("adapter")
    base = find_base_model(model, options.get("revision"), quantize=quantize)
    base, weights = with_adapter(base, None if adapter is None else os.fspath(adapter))
    placement = Placement(
        backend=options.get("backend", "auto"),
        device=options.get("device", "auto"),
        dtype=options.get("dtype", "auto"),
    )
    return ModelToOpen(base, weights, placement, options.get("note", log_note))


def load(
    model: str,
    *,
    adapter: AnyPath | None = None,
    revision: str | None = None,
    backend: str = "auto",
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    quantize: Quantization = "none",
    note: Note = log_note,
) -> LoadedModel:
    """Load a base model with or without an adapter of any layout.

    Args:
        model: a folder, a hub id, or demo.
        adapter: an adapter's folder or hub id.
        revision: branch, tag or commit of a hub id.
        backend: mlx, cuda or auto.
        device: auto, cpu or gpu.
        dtype: dtype of the base model: float32, bfloat16, float16 or auto.
        quantize: quantisation of the base model: none, 4bit, 8bit, nf4 (cuda) or mlx-affine (mlx).
        note: receives each text for the user; the default logs it as a warning.

    Raises:
        Phi3LoraError: with what is wrong and what to do.
    """
    return find_model(
        model,
        adapter=adapter,
        revision=revision,
        backend=backend,
        device=device,
        dtype=dtype,
        quantize=quantize,
        note=note,
    ).open()


def evaluate(
    model: str,
    data: Data,
    *,
    generate: bool = False,
    limit: int | None = None,
    max_new_tokens: int = 256,
    max_length: int = 2048,
    on_bad_row: OnBadRow = "error",
    loss_on: LossOn = "assistant",
    on_progress: Progress = lambda stage, done, total: None,
    **options: Unpack[ModelOptions],
) -> EvaluationResult:
    """Load a model and return its scores on data.

    Args:
        model: a folder, a hub id, or demo.
        data: a file, a folder, a pattern, a data set of the hub, or demo. If a folder or data set
            has validation rows, only those are used.
        generate: also generate the last answer of each row, and count exact matches.
        limit: use the first rows only.
        max_new_tokens: most tokens of a generated answer.
        max_length: most tokens of a row; longer rows are skipped and counted.
        on_bad_row: error, or skip to leave out and list the rows that cannot be used.
        loss_on: assistant (every answer), last (the last answer) or all tokens.
        on_progress: receives the stage (scoring or answering), the rows done, and all rows.
        options: adapter, revision, backend, device, dtype, quantize and note, as for load.

    Raises:
        Phi3LoraError: with what is wrong and what to do.
    """
    wanted = EvaluationOptions(
        generate=generate,
        limit=limit,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        on_bad_row=on_bad_row,
        loss_on=loss_on,
        on_progress=on_progress,
    )
    found = find_model(model, **options)
    # Read data before loading the weights, which takes long, to report bad data early.
    rows = rows_to_score(found.base, data, wanted, found.note)
    with found.open() as loaded:
        return loaded.evaluate_rows(rows, wanted)


def generate(
    model: str,
    prompt: Prompt,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
    **options: Unpack[ModelOptions],
) -> Generation:
    """Load a model and answer one prompt.

    Args:
        model: a folder, a hub id, or demo.
        prompt: a user's message, or messages that end with one.
        system: a system message before prompt.
        max_new_tokens: most tokens of the answer.
        temperature: 0 always chooses the most likely token.
        seed: seed of the draws.
        on_text: receives each piece of the answer as it comes.
        options: adapter, revision, backend, device, dtype, quantize and note, as for load.

    Raises:
        Phi3LoraError: with what is wrong and what to do.
    """
    found = find_model(model, **options)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [generation.user_message(prompt)] if isinstance(prompt, str) else prompt
    tokenizer = found.base.tokenizer
    ids = generation.encode_prompts(tokenizer, [messages])
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop_ids=found.base.stop_ids,
    )
    with found.open() as loaded:
        answers = generation.generate(
            loaded.engine, tokenizer, ids, sampling, lambda piece: on_text(piece.text_delta)
        )
    return answers[0]
