"""The laws on a GPU: float32 at the gates of the CPU, bfloat16 at its own.

Metal, CUDA under MLX and CUDA under PyTorch run the same tests; a backend without a GPU is left
out by name: MLX on Linux has one only with a mlx-cuda package.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Phi3ForCausalLM

from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.protocol import Engine
from phi3_lora.engine.registry import load_backend
from phi3_lora.engine.request import LoadRequest, OptimSpec, Sampling
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import read_model_files
from tests.tiny import lora_spec, random_adapter, random_documents, write_model

pytestmark = pytest.mark.gpu
LENGTHS = [1, 2, 17, 40, 9, 300, 30]
VARIANTS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "window": {"sliding_window": 16},
    "head-96": {"hidden_size": 384, "intermediate_size": 256},
}


def gpu_backends() -> list[str]:
    """Backends that have a GPU here."""
    found = []
    for name in ("cuda", "mlx"):
        try:
            load_backend(name).check("gpu")
        except Exception:
            continue
        found.append(name)
    return found


@pytest.fixture(params=gpu_backends() or ["no GPU"])
def backend(request: pytest.FixtureRequest) -> str:
    assert request.param != "no GPU", "these tests need an accelerator"
    return str(request.param)


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m"), **VARIANTS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain"))


def opened(folder: Path, backend: str, device: str, **changes: object) -> Engine:
    config = read_model_config(folder)
    request = LoadRequest(
        model=read_model_files(folder), device=device, lora=lora_spec(config), dtype="float32"
    )
    engine = load_backend(backend).open(replace(request, **changes))
    engine.write_adapter(random_adapter(config.linear_shapes(), r=4))
    return engine


def reference(folder: Path) -> Engine:
    return opened(folder, "cuda", "cpu")


def gradients(engine: Engine, documents: list) -> dict:
    count = sum(d.loss_tokens for d in documents)
    return engine.gradients(make_batch(documents), loss_tokens=count)


def largest(found: dict, expected: dict) -> float:
    return max(
        float(np.linalg.norm(found[n] - expected[n]) / np.linalg.norm(expected[n]))
        for n in expected
    )


class Stock:
    """transformers and PEFT on the CPU, each document alone: what bfloat16 costs by itself."""

    def __init__(self, folder: Path, dtype: str) -> None:
        shapes = read_model_config(folder).linear_shapes()
        model = Phi3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(shapes))
        self.model = peft.get_peft_model(model, config)
        weights = random_adapter(shapes, r=4)
        self.parameters = {
            n.replace(".default", ""): p
            for n, p in self.model.named_parameters()
            if p.requires_grad
        }
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(weights[name]))

    def logits(self, documents: list) -> np.ndarray:
        ids = [torch.from_numpy(d.tokens).long()[None] for d in documents]
        with torch.no_grad():
            return torch.cat([self.model(i).logits[0] for i in ids]).float().numpy()

    def gradients(self, documents: list) -> dict[str, np.ndarray]:
        count = sum(d.loss_tokens for d in documents)
        for document in documents:
            ids = torch.from_numpy(document.tokens).long()[None]
            rows = np.flatnonzero(document.supervised)
            logits = self.model(ids).logits[0, rows - 1].float()
            (cross_entropy(logits, ids[0, rows], reduction="sum") / count).backward()
        return {n: p.grad.float().numpy() for n, p in self.parameters.items()}


@pytest.fixture(scope="module")
def bfloat16_costs(folder: Path) -> tuple[float, float]:
    """Largest error of a logit, and of a gradient, of stock tools in bfloat16."""
    documents = random_documents(LENGTHS[2:])
    exact, rounded = Stock(folder, "float32"), Stock(folder, "bfloat16")
    logits = np.abs(rounded.logits(documents) - exact.logits(documents)).max()
    return float(logits), largest(rounded.gradients(documents), exact.gradients(documents))


def test_logits_are_those_of_the_cpu(folder: Path, backend: str) -> None:
    batch = make_batch(random_documents(LENGTHS))
    rows = np.arange(len(batch.tokens), dtype=np.int32)
    expected = reference(folder).logits(batch, rows)
    found = opened(folder, backend, "gpu").logits(batch, rows)
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()


def test_gradients_are_those_of_the_cpu(folder: Path, backend: str) -> None:
    documents = random_documents(LENGTHS[2:])
    expected = gradients(reference(folder), documents)
    assert largest(gradients(opened(folder, backend, "gpu"), documents), expected) <= 1e-5


def test_bfloat16_costs_no_more_than_in_stock_tools(
    folder: Path, backend: str, bfloat16_costs: tuple[float, float]
) -> None:
    documents = random_documents(LENGTHS[2:])
    batch = make_batch(documents)
    rows = np.arange(len(batch.tokens), dtype=np.int32)
    exact, rounded = reference(folder), opened(folder, backend, "gpu", dtype="bfloat16")
    logits = np.abs(rounded.logits(batch, rows) - exact.logits(batch, rows)).max()
    assert logits <= 1.5 * bfloat16_costs[0]
    cost = largest(gradients(rounded, documents), gradients(exact, documents))
    assert cost <= 1.5 * bfloat16_costs[1]


def test_gradients_do_not_depend_on_micro_batches(folder: Path, backend: str) -> None:
    documents = random_documents(LENGTHS[2:])
    whole = gradients(opened(folder, backend, "gpu"), documents)
    small = opened(folder, backend, "gpu", micro_batch_tokens=50)
    assert largest(gradients(small, documents[::-1]), whole) <= 1e-5


def test_a_document_does_not_see_another(folder: Path, backend: str) -> None:
    engine = opened(folder, backend, "gpu", dtype="bfloat16")
    first, second, other = random_documents([40, 300, 40])
    one = engine.score(make_batch([first, second]))
    two = engine.score(make_batch([other, second]))
    assert one.nats[1] == two.nats[1] and one.nats[0] != two.nats[0]


def trace(engine: Engine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last + 1):
        batch = make_batch(random_documents([12, 20, 64], seed=step % 10))
        count = int(batch.loss_mask.sum())
        losses.append(float(engine.train_step(batch, loss_tokens=count, lr=5e-3, step=step).loss))
    return losses


@pytest.mark.parametrize(("dtype", "gate"), [("float32", 2e-5), ("bfloat16", 0.03)])
def test_a_hundred_steps_are_those_of_the_cpu(
    plain: Path, backend: str, dtype: str, gate: float
) -> None:
    optim = OptimSpec(weight_decay=0.01)
    expected = trace(opened(plain, "cuda", "cpu", optim=optim), 1, 100)
    found = trace(opened(plain, backend, "gpu", optim=optim, dtype=dtype), 1, 100)
    assert np.max(np.abs(np.divide(found, expected) - 1)) <= gate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_bit_equal(plain: Path, backend: str, dtype: str) -> None:
    engine = opened(plain, backend, "gpu", dtype=dtype)
    trace(engine, 1, 10)
    weights, moments = engine.read_adapter(), engine.read_optimizer()
    expected = trace(engine, 11, 20)
    again = opened(plain, backend, "gpu", dtype=dtype)
    again.write_adapter(weights)
    again.write_optimizer(moments)
    assert trace(again, 11, 20) == expected
    final = engine.read_adapter()
    assert all(np.array_equal(final[n], v) for n, v in again.read_adapter().items())


def test_greedy_tokens_are_those_of_the_cpu(folder: Path, backend: str) -> None:
    prompt = random_documents([30])[0].tokens.tolist()
    expected, found = (
        list(engine.generate([prompt], Sampling(max_new_tokens=12)))
        for engine in (reference(folder), opened(folder, backend, "gpu"))
    )
    assert found == expected


def test_gradient_checkpointing_changes_no_gradient(plain: Path, backend: str) -> None:
    documents = random_documents(LENGTHS[2:])
    expected = gradients(opened(plain, backend, "gpu"), documents)
    engine = opened(plain, backend, "gpu", gradient_checkpointing=True)
    assert largest(gradients(engine, documents), expected) <= 1e-6


def test_compiling_costs_no_accuracy(
    folder: Path, backend: str, bfloat16_costs: tuple[float, float]
) -> None:
    documents = random_documents(LENGTHS[2:])
    exact = gradients(reference(folder), documents)
    engine = opened(folder, backend, "gpu", dtype="bfloat16", compile=True)
    assert largest(gradients(engine, documents), exact) <= 1.5 * bfloat16_costs[1]
    # Another number of documents, and scoring, with the same engine.
    assert np.isfinite(engine.score(make_batch(documents[:2])).nats).all()
    assert (
        largest(gradients(engine, documents[:2]), gradients(reference(folder), documents[:2])) < 0.2
    )
