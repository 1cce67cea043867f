"""The laws on a GPU: float32 at the gates of the CPU, bfloat16 at its own.

Metal, CUDA under MLX and CUDA under PyTorch run the same tests; a backend without a GPU is left
out by name: MLX on Linux has one only with a mlx-cuda package.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.backend import Engine, LoadRequest, OptimSpec, Sampling
from phi3_lora.data.dataset import make_batch
from phi3_lora.models import read_model_config
from phi3_lora.registry import load_backend
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
    request = LoadRequest(model_dir=folder, device=device, lora=lora_spec(config), dtype="float32")
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


@pytest.mark.parametrize(("dtype", "gate"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_logits_are_those_of_the_cpu(folder: Path, backend: str, dtype: str, gate: float) -> None:
    batch = make_batch(random_documents(LENGTHS))
    rows = np.arange(len(batch.tokens), dtype=np.int32)
    expected = reference(folder).logits(batch, rows)
    found = opened(folder, backend, "gpu", dtype=dtype).logits(batch, rows)
    assert np.abs(found - expected).max() <= gate * expected.std()


@pytest.mark.parametrize(("dtype", "gate"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_gradients_are_those_of_the_cpu(
    folder: Path, backend: str, dtype: str, gate: float
) -> None:
    documents = random_documents(LENGTHS[2:])
    expected = gradients(reference(folder), documents)
    found = gradients(opened(folder, backend, "gpu", dtype=dtype), documents)
    assert largest(found, expected) <= gate


@pytest.mark.parametrize(("dtype", "gate"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_gradients_do_not_depend_on_micro_batches(
    folder: Path, backend: str, dtype: str, gate: float
) -> None:
    documents = random_documents(LENGTHS[2:])
    whole = gradients(opened(folder, backend, "gpu", dtype=dtype), documents)
    small = opened(folder, backend, "gpu", dtype=dtype, micro_batch_tokens=50)
    assert largest(gradients(small, documents[::-1]), whole) <= gate


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
        list(engine.generate(prompt, Sampling(max_new_tokens=12)))
        for engine in (reference(folder), opened(folder, backend, "gpu"))
    )
    assert found == expected


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"compile": True}])
def test_memory_and_speed_options_change_no_gradient(
    plain: Path, backend: str, changes: dict
) -> None:
    documents = random_documents(LENGTHS[2:])
    expected = gradients(opened(plain, backend, "gpu"), documents)
    assert largest(gradients(opened(plain, backend, "gpu", **changes), documents), expected) <= 1e-5
