"""One optimizer-step benchmark per process: ours, a plain loop, and the peers' trainers.

Prints one JSON line: seconds and real tokens of each step. Driven by steps.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.data.documents.dataset import build_dataset
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.sources.reading import read_conversations
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.engine.registry import load_backend
from phi3_lora.engine.request import LoadRequest
from phi3_lora.inference.base_model import find_base_model
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import read_model_files
from tests.tiny import start_weights

RANK, SCALING, LEARNING_RATE = 16, 2.0, 1e-4


class Job:
    """A model, the documents of each step, and where to run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model_dir = Path(options.model)
        self.device, self.dtype = options.device, options.dtype
        self.micro_batch_tokens = options.micro_batch_tokens
        self.per_step = options.documents
        self.config = read_model_config(self.model_dir)
        self.shapes = self.config.linear_shapes()
        documents = _documents(options, self.config.vocab_size)
        self.steps = [
            documents[i : i + self.per_step] for i in range(0, len(documents), self.per_step)
        ]
        self.start = start_weights(self.shapes, r=RANK, seed=0)


def _documents(options: argparse.Namespace, vocab_size: int) -> list[Document]:
    count = options.steps * options.documents
    if options.data:
        rows = read_conversations(Path(options.data))[:count]
        base = find_base_model(options.model)
        return list(
            build_dataset(rows, base.tokenizer, Encoding(max_length=2048), "data").documents
        )
    rng = np.random.default_rng(0)
    # Chat-like lengths: mean about 375 tokens.
    lengths = np.clip(rng.lognormal(5.55, 0.85, count), 16, 2048).astype(int)
    documents = []
    for i, length in enumerate(lengths):
        supervised = np.zeros(length, bool)
        supervised[length // 2 :] = True
        tokens = rng.integers(0, vocab_size, length).astype(np.int32)
        documents.append(Document(tokens, supervised, f"random:{i + 1}"))
    return documents


def ours(job: Job, backend: str, **changes: Any) -> Iterator[float]:
    """This project's engine."""
    spec = LoraSpec.uniform(job.shapes, r=RANK, scaling=SCALING)
    engine = load_backend(backend).open(
        LoadRequest(
            model=read_model_files(job.model_dir),
            device=job.device,
            dtype=job.dtype,
            lora=spec,
            micro_batch_tokens=job.micro_batch_tokens,
            **changes,
        )
    )
    engine.write_adapter(job.start)
    for step, documents in enumerate(job.steps, 1):
        count = sum(d.loss_tokens for d in documents)
        result = engine.train_step(
            make_batch(documents), loss_tokens=count, lr=LEARNING_RATE, step=step
        )
        assert float(result.grad_norm) > 0
        yield float(result.loss)
    PEAK.append(engine.peak_memory_bytes())


def plain_torch(job: Job) -> Iterator[float]:
    """Transformers and PEFT, a document at a time, the head only where the loss counts."""
    import peft
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import Phi3ForCausalLM

    device = "cuda" if job.device == "gpu" else "cpu"
    base = Phi3ForCausalLM.from_pretrained(job.model_dir, dtype=getattr(torch, job.dtype))
    base.to(device)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALING, target_modules=list(job.shapes))
    peft.get_peft_model(base, config)
    parameters = _write_start(base, job)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    for documents in job.steps:
        count, total = sum(d.loss_tokens for d in documents), 0.0
        for document in documents:
            ids = torch.from_numpy(document.tokens).to(device, torch.long)
            rows = torch.from_numpy(np.flatnonzero(document.supervised)).to(device)
            hidden = base.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            logits = base.lm_head(hidden[rows - 1]).float()
            loss = cross_entropy(logits, ids[rows], reduction="sum") / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(total)
    if device == "cuda":
        PEAK.append(torch.cuda.max_memory_allocated())


def _write_start(base: Any, job: Job) -> list[Any]:
    """Write our starting adapter into PEFT's layers and return the trainable parameters."""
    import torch

    parameters = dict(base.named_parameters())
    for path in job.shapes:
        for name, tensor in (("lora_A", lora_a_name(path)), ("lora_B", lora_b_name(path))):
            target = parameters[f"{path}.{name}.default.weight"]
            with torch.no_grad():
                target.copy_(torch.from_numpy(job.start[tensor].copy()))
    return [p for p in parameters.values() if p.requires_grad]


def plain_mlx(job: Job) -> Iterator[float]:
    """Stock mlx-lm model and LoRA layers, a document at a time, the head where the loss counts."""
    from phi3_lora_mlx import BLAS  # noqa: F401 - the same BLAS as ours

    import mlx.core as mx  # isort: skip
    import mlx.nn as nn
    import mlx.optimizers as optimizers
    from mlx.utils import tree_map
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.gpu if job.device == "gpu" else mx.cpu)
    model, _ = load_model(job.model_dir)
    model.set_dtype(getattr(mx, job.dtype))
    model.freeze()
    keys = sorted({path.split(".", 3)[3] for path in job.shapes})
    linear_to_lora_layers(
        model,
        job.config.num_hidden_layers,
        {"rank": RANK, "scale": SCALING, "dropout": 0.0, "keys": keys},
    )
    for path in job.shapes:
        layer = model
        for part in path.split("."):
            layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
        layer.lora_a = mx.array(np.ascontiguousarray(job.start[lora_a_name(path)].T))
        layer.lora_b = mx.array(np.ascontiguousarray(job.start[lora_b_name(path)].T))
    optimizer = optimizers.AdamW(LEARNING_RATE, weight_decay=0.0, bias_correction=True)

    def document_loss(model: Any, ids: mx.array, rows: mx.array) -> mx.array:
        hidden = model.model(ids[None])[0][rows - 1]
        tied = job.config.tie_word_embeddings
        head = model.model.embed_tokens.as_linear if tied else model.lm_head
        return nn.losses.cross_entropy(head(hidden).astype(mx.float32), ids[rows], reduction="sum")

    value_and_grad = nn.value_and_grad(model, document_loss)
    for documents in job.steps:
        count = sum(d.loss_tokens for d in documents)
        gradients, total = None, mx.array(0.0)
        for document in documents:
            ids, rows = mx.array(document.tokens), mx.array(np.flatnonzero(document.supervised))
            loss, part = value_and_grad(model, ids, rows)
            gradients = part if gradients is None else tree_map(mx.add, gradients, part)
            total = total + loss
            mx.eval(gradients, total)
        gradients = tree_map(lambda g, count=count: g / count, gradients)
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        yield float(total) / count
    if job.device == "gpu":
        PEAK.append(mx.get_peak_memory())


def trl(job: Job, **changes: Any) -> Iterator[float]:
    """TRL's SFTTrainer with PEFT; times come from its own step callback."""
    import tempfile

    import datasets
    import peft
    import torch
    import transformers
    from trl import SFTConfig, SFTTrainer

    losses: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            STEP_TIMES.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if job.device == "gpu":
                torch.cuda.synchronize()
            STEP_TIMES[-1] += time.perf_counter()

    documents = [d for step in job.steps for d in step]
    rows = {
        "input_ids": [d.tokens.tolist() for d in documents],
        "labels": [np.where(d.supervised, d.tokens, -100).tolist() for d in documents],
    }
    model = transformers.Phi3ForCausalLM.from_pretrained(
        job.model_dir, dtype=getattr(torch, job.dtype)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(job.model_dir / "tokenizer.json"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    batch = min(8, job.per_step)
    options = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": job.per_step // batch,
        "max_length": 2048,
        "learning_rate": LEARNING_RATE,
        "max_steps": len(job.steps),
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": job.device == "cpu",
        "save_strategy": "no",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        **changes,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=folder, **options),
            # Pass a fingerprint, since computing one pickles half of pyarrow.
            train_dataset=datasets.Dataset(
                datasets.table.InMemoryTable.from_pydict(rows), fingerprint="benchmark"
            ),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(
                r=RANK, lora_alpha=RANK * SCALING, target_modules=list(job.shapes)
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if job.device == "gpu":
        PEAK.append(torch.cuda.max_memory_allocated())
    yield from losses


STEP_TIMES: list[float] = []
"""Times of steps, which trainers with their own loop record."""
PEAK: list[int] = []
"""Memory on the GPU in bytes."""

CONTENDERS: dict[str, Callable[[Job], Iterator[float]]] = {
    "ours-cuda": lambda job: ours(job, "cuda"),
    "ours-cuda-compiled": lambda job: ours(job, "cuda", compile=True),
    "ours-cuda-checkpointed": lambda job: ours(job, "cuda", gradient_checkpointing=True),
    "ours-mlx": lambda job: ours(job, "mlx"),
    "plain-torch": plain_torch,
    "plain-mlx": plain_mlx,
    "trl-default": trl,
    "trl-tuned": lambda job: trl(job, gradient_checkpointing=False, bf16=job.device == "gpu"),
}


def main() -> None:
    """Run one contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", help="chat JSONL; random documents of chat-like length if unset")
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--documents", type=int, default=4, help="a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    options = parser.parse_args()
    job = Job(options)
    seconds, losses, began = [], [], time.perf_counter()
    for loss in CONTENDERS[options.contender](job):
        losses.append(loss)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    result = {
        "contender": options.contender,
        "seconds": STEP_TIMES or seconds,
        "tokens": [sum(len(d.tokens) for d in step) for step in job.steps],
        "supervised": [sum(d.loss_tokens for d in step) for step in job.steps],
        "losses": losses,
        "peak_bytes": max(PEAK, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
