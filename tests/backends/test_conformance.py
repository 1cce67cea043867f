"""Behaviour that each backend must have, compared with the core's references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Phi3Model

from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.protocol import Engine
from phi3_lora.engine.request import LoadRequest, Sampling
from phi3_lora.errors import TrainingError
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import read_model_files
from phi3_lora_cuda import CudaBackend
from phi3_lora_mlx import MlxBackend
from phi3_lora_mlx.engine import MlxEngine
from phi3_lora_mlx.layout import ROW_TOKENS
from phi3_lora_mlx.model import load_model
from phi3_lora_mlx.phi3 import Phi3
from tests.tiny import lora_spec, random_adapter, random_documents, write_model


def open_mlx(request: LoadRequest) -> Engine:
    return MlxBackend().open(request)


def open_mlx_padded(request: LoadRequest) -> Engine:
    """Open an engine with the layout and the compiled step of a GPU, on the CPU."""
    return MlxEngine(load_model(request, on_gpu=False), request, on_gpu=True)


def open_cuda(request: LoadRequest) -> Engine:
    return CudaBackend().open(request)


def open_mlx_gpu(request: LoadRequest) -> Engine:
    return MlxBackend().open(replace(request, device="gpu"))


def open_cuda_gpu(request: LoadRequest) -> Engine:
    return CudaBackend().open(replace(request, device="gpu"))


OPENERS = {
    "mlx": open_mlx,
    "mlx-padded": open_mlx_padded,
    "cuda": open_cuda,
    "mlx-gpu": open_mlx_gpu,
    "cuda-gpu": open_cuda_gpu,
}
ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("mlx-gpu", "cuda-gpu")]
EVERY = ["mlx", "mlx-padded", "cuda", *ON_GPU]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), num_key_value_heads=2)


def opened(folder: Path, opener: str, dropout: float = 0.0, **changes: object) -> Engine:
    config = read_model_config(folder)
    spec = lora_spec(config, dropout=dropout)
    engine = OPENERS[opener](
        LoadRequest(model=read_model_files(folder), device="cpu", lora=spec, **changes)
    )
    engine.write_adapter(random_adapter(config.linear_shapes(), r=4))
    return engine


def gradients(engine: Engine, lengths: tuple[int, ...] = (12, 30, 7)) -> dict:
    batch = make_batch(random_documents(list(lengths)))
    return engine.gradients(batch, loss_tokens=int(batch.loss_mask.sum()), step=3)


def largest_relative(a: dict, b: dict) -> float:
    return max(float(np.linalg.norm(a[k] - b[k]) / np.linalg.norm(b[k])) for k in b)


@pytest.mark.parametrize("opener", EVERY)
def test_adapter_comes_back_bit_equal(folder: Path, opener: str) -> None:
    engine = opened(folder, opener)
    weights = random_adapter(read_model_config(folder).linear_shapes(), r=4, seed=5)
    engine.write_adapter(weights)
    found = engine.read_adapter()
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("opener", EVERY)
def test_optimizer_state_comes_back_bit_equal(folder: Path, opener: str) -> None:
    engine = opened(folder, opener)
    batch = make_batch(random_documents([12]))
    engine.train_step(batch, loss_tokens=int(batch.loss_mask.sum()), lr=1e-3, step=1)
    state = engine.read_optimizer()
    assert len(state) == 2 * len(engine.read_adapter())
    other = opened(folder, opener)
    other.write_optimizer(state)
    found = other.read_optimizer()
    assert all(np.array_equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("opener", ["mlx", "mlx-padded", *ON_GPU])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_equal_those_of_pytorch_with_and_without_dropout(
    folder: Path, opener: str, dropout: float
) -> None:
    expected = gradients(opened(folder, "cuda", dropout))
    assert largest_relative(gradients(opened(folder, opener, dropout)), expected) <= 1e-5


@pytest.mark.parametrize("opener", ["mlx-padded", *ON_GPU])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [(ROW_TOKENS + 40,), (ROW_TOKENS - 30, ROW_TOKENS + 30)])
def test_documents_longer_than_a_padded_row(
    tmp_path: Path, opener: str, window: int | None, lengths: tuple[int, ...]
) -> None:
    """Compare padded and exactly full buckets: the second pair needs no padding."""
    folder = write_model(tmp_path, sliding_window=window)
    batch = make_batch(random_documents(list(lengths)))
    rows = np.arange(0, len(batch.tokens), 97, dtype=np.int32)
    found, expected = (opened(folder, o).logits(batch, rows) for o in (opener, "cuda"))
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()


def test_dropout_changes_the_gradients(folder: Path) -> None:
    plain, dropped = (gradients(opened(folder, "cuda", p)) for p in (0.0, 0.3))
    assert largest_relative(dropped, plain) > 0.1


@pytest.mark.parametrize("opener", ["mlx", "cuda", *ON_GPU])
def test_gradient_checkpointing_changes_nothing(folder: Path, opener: str) -> None:
    expected = gradients(opened(folder, opener))
    found = gradients(opened(folder, opener, gradient_checkpointing=True))
    assert largest_relative(found, expected) <= 1e-6


@pytest.mark.parametrize("opener", EVERY)
def test_scores_agree_with_logprobs(folder: Path, opener: str) -> None:
    engine = opened(folder, opener)
    batch = make_batch(random_documents([12, 30, 7]))
    scores, logprobs = engine.score(batch), engine.logprobs(batch)
    starts = batch.doc_starts
    for d in range(3):
        part = slice(starts[d], starts[d + 1])
        nats = -logprobs[part][batch.loss_mask[part]].sum()
        assert scores.nats[d] == pytest.approx(nats, rel=1e-5)
        assert scores.supervised[d] == batch.loss_mask[part].sum()


@pytest.mark.parametrize("opener", ["mlx", "cuda"])
def test_a_full_memory_is_told_with_what_to_do(
    folder: Path, opener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(folder, opener, micro_batch_tokens=77)
    fault = {
        "mlx": RuntimeError("[metal::malloc] Attempting to allocate 1 bytes"),
        "cuda": torch.OutOfMemoryError("CUDA out of memory"),
    }[opener]

    def fail(*arguments: object, **options: object) -> None:
        raise fault

    monkeypatch.setattr(*{"mlx": (Phi3, "__call__"), "cuda": (Phi3Model, "forward")}[opener], fail)
    batch = make_batch(random_documents([12]))
    for call in (
        lambda: engine.train_step(batch, loss_tokens=6, lr=1e-3, step=1),
        lambda: engine.gradients(batch, loss_tokens=6),
        lambda: engine.score(batch),
        lambda: engine.logprobs(batch),
        lambda: engine.logits(batch, np.array([3], np.int32)),
        lambda: list(engine.generate([[1, 2]], Sampling(max_new_tokens=2))),
    ):
        with pytest.raises(TrainingError, match="micro-batches of 77 tokens: halve"):
            call()


def answers(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for index, token in engine.generate(prompts, sampling):
        found[index].append(token)
    return found


@pytest.mark.parametrize("opener", EVERY)
def test_a_batch_of_prompts_gets_the_answers_of_each_alone(folder: Path, opener: str) -> None:
    engine = opened(folder, opener)
    prompts = [d.tokens.tolist() for d in random_documents([3, 40, 1, 17])]
    sampling = Sampling(max_new_tokens=8, temperature=0.7, seed=5)
    found = answers(engine, prompts, sampling)
    assert found == [answers(opened(folder, opener), [prompt], sampling)[0] for prompt in prompts]
    assert len({tuple(answer) for answer in found}) > 1


@pytest.mark.parametrize("opener", EVERY)
def test_cached_keys_are_forgotten_when_the_model_changes(folder: Path, opener: str) -> None:
    prompt = random_documents([30])[0].tokens.tolist()
    sampling = Sampling(max_new_tokens=6)
    weights = random_adapter(read_model_config(folder).linear_shapes(), r=4, seed=9)
    batch = make_batch(random_documents([20]))
    fresh = opened(folder, opener)
    with fresh.base_only():
        bare = answers(fresh, [prompt], sampling)
    other = answers(opened_with(folder, opener, weights), [prompt], sampling)
    engine = opened(folder, opener)
    own = answers(engine, [prompt], sampling)
    assert own not in (bare, other) and bare != other
    with engine.base_only():
        assert answers(engine, [prompt], sampling) == bare
    assert answers(engine, [prompt], sampling) == own
    # The generation that was running has cached keys of both adapters at its end.
    stream = engine.generate([prompt], sampling)
    next(stream)
    engine.write_adapter(weights)
    list(stream)
    assert answers(engine, [prompt], sampling) == other
    engine.train_step(batch, loss_tokens=1, lr=0.05, step=1)
    trained = opened_with(folder, opener, engine.read_adapter())
    assert answers(engine, [prompt], sampling) == answers(trained, [prompt], sampling)


def opened_with(folder: Path, opener: str, weights: dict) -> Engine:
    engine = opened(folder, opener)
    engine.write_adapter(weights)
    return engine


@pytest.mark.parametrize(
    ("opener", "expected"), [("mlx", [49, 49]), ("cuda", [49, 49]), ("mlx-padded", [256, 512])]
)
def test_computed_tokens_are_those_that_a_step_computes_on(
    folder: Path, opener: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (12, 30, 7)
    for budget, tokens in zip((8192, 40), expected, strict=True):
        engine = opened(folder, opener, micro_batch_tokens=budget)
        assert engine.computed_tokens(np.array(lengths)) == tokens
        if isinstance(engine, MlxEngine):
            rows, seen = engine._rows, []
            monkeypatch.setattr(
                engine,
                "_rows",
                lambda *given, rows=rows, seen=seen: seen.append(rows(*given)) or seen[-1],
            )
            gradients(engine, lengths)
            assert sum(row.tokens.size for row in seen) == tokens
