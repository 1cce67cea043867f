"""Engines share no state: a failed step or another engine changes no numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

import phi3_lora_cuda.engine
import phi3_lora_mlx.engine
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.lora_spec import LoraLayer, LoraSpec
from phi3_lora.engine.protocol import Batch, Engine
from phi3_lora.engine.request import LoadRequest, Sampling
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import read_model_files
from phi3_lora_cuda import CudaBackend
from phi3_lora_cuda.dropout import HashDropout
from phi3_lora_mlx import MlxBackend
from tests.backends.test_conformance import OPENERS
from tests.tiny import random_documents, write_model

ON_CPU = ["mlx", "mlx-padded", "cuda"]
ENGINES = {
    "mlx": phi3_lora_mlx.engine,
    "mlx-padded": phi3_lora_mlx.engine,
    "cuda": phi3_lora_cuda.engine,
}


def batch_of(*lengths: int) -> Batch:
    return make_batch(random_documents(list(lengths)))


def opened(folder: Path, opener: str) -> Engine:
    """Open an engine with DoRA, dropout and micro-batches of 30 tokens."""
    config = read_model_config(folder)
    layer = LoraLayer(r=4, lora_alpha=8.0)
    spec = LoraSpec(layers=dict.fromkeys(config.linear_shapes(), layer), use_dora=True, dropout=0.3)
    request = LoadRequest(
        model=read_model_files(folder), device="cpu", lora=spec, micro_batch_tokens=30, seed=3
    )
    engine = OPENERS[opener](request)
    rng = np.random.default_rng(7)
    engine.write_adapter(
        {
            name: rng.uniform(0.02, 0.05, value.shape).astype(np.float32)
            for name, value in engine.read_adapter().items()
        }
    )
    return engine


def everything(engine: Engine) -> dict[str, np.ndarray]:
    """Collect all outputs of an engine, and its adapter after a step."""
    batch = batch_of(12, 25, 7)
    scores = engine.score(batch)
    found = {"nats": scores.nats, "correct": scores.correct, "logprobs": engine.logprobs(batch)}
    found["logits"] = engine.logits(batch, np.array([3, 20], np.int32))
    answer = [token for _, token in engine.generate([[5, 6, 7]], Sampling(max_new_tokens=6))]
    found["answer"] = np.array(answer)
    with engine.base_only():
        found["base"] = engine.logprobs(batch)
    result = engine.train_step(batch, loss_tokens=20, lr=1e-2, step=2)
    found["loss"] = np.array([float(result.loss), float(result.grad_norm)])
    return found | engine.read_adapter() | engine.read_optimizer()


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not np.array_equal(found[name], expected[name])]
    assert not different


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), num_key_value_heads=2)


def break_at_the_head(opener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("something broke half-way")

    monkeypatch.setattr(ENGINES[opener], "head_loss", fail)


def break_after_a_part(opener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ENGINES[opener].micro_batches

    def parts(batch: Batch, limit: int) -> Iterator[Batch]:
        yield real(batch, limit)[0]
        raise RuntimeError("something broke half-way")

    monkeypatch.setattr(ENGINES[opener], "micro_batches", parts)


@pytest.mark.parametrize("break_it", [break_at_the_head, break_after_a_part])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("opener", ON_CPU)
def test_an_engine_that_survives_a_failed_step_is_as_a_fresh_one(
    folder: Path,
    opener: str,
    is_first: bool,
    break_it: Callable[[str, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good, bad = batch_of(20, 25), batch_of(28, 129, 27)
    expected, survivor = opened(folder, opener), opened(folder, opener)
    expected.train_step(good, loss_tokens=20, lr=1e-2, step=1)
    if not is_first:
        survivor.train_step(good, loss_tokens=20, lr=1e-2, step=1)
    break_it(opener, monkeypatch)
    if opener == "mlx-padded" and break_it is break_at_the_head:
        # A compiled step calls the head only for a new shape.
        bad = batch_of(700, 129)
    with pytest.raises(RuntimeError, match="half-way"):
        survivor.train_step(bad, loss_tokens=40, lr=1e-2, step=1 if is_first else 2)
    monkeypatch.undo()
    if is_first:
        survivor.train_step(good, loss_tokens=20, lr=1e-2, step=1)
    assert_same(everything(survivor), everything(expected))


@pytest.mark.parametrize("opener", ON_CPU)
def test_scores_while_a_step_fails_have_no_dropout(
    folder: Path, opener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, batch = opened(folder, opener), batch_of(12, 25)
    before = engine.logprobs(batch)

    break_at_the_head(opener, monkeypatch)
    with pytest.raises(RuntimeError, match="half-way"):
        engine.gradients(batch, loss_tokens=10, step=4)
    assert np.array_equal(engine.logprobs(batch), before)


@pytest.mark.parametrize("opener", ON_CPU)
def test_two_models_in_one_process_give_the_numbers_that_each_gives_alone(
    folder: Path, tmp_path: Path, opener: str
) -> None:
    other = write_model(tmp_path, seed=5, num_hidden_layers=3, sliding_window=20)
    alone = [everything(opened(f, opener)) for f in (folder, other)]
    engines = [opened(f, opener) for f in (folder, other)]
    batch = batch_of(12, 25)
    streams = [e.generate([[5, 6, 7]], Sampling(max_new_tokens=6)) for e in engines]
    mixed = [[next(s)[1] for s in streams] for _ in range(6)]
    for index, expected in enumerate(alone):
        assert [row[index] for row in mixed] == expected["answer"].tolist()
    for engine in engines:
        engine.gradients(batch, loss_tokens=10, step=1)
    for engine, expected in zip(reversed(engines), reversed(alone), strict=True):
        assert_same(everything(engine), expected)


def test_a_step_between_two_tokens_leaves_the_rest_of_the_answer_in_eval_mode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, sampling = opened(folder, "cuda"), Sampling(max_new_tokens=6)
    expected = [token for _, token in engine.generate([[5, 6, 7]], sampling)]
    answer = engine.generate([[5, 6, 7]], sampling)
    found = [next(answer)[1]]
    engine.train_step(batch_of(12, 25), loss_tokens=20, lr=0.0, step=1)
    real, modes = HashDropout.forward, []

    def forward(self: HashDropout, x: torch.Tensor) -> torch.Tensor:
        modes.append(self.training)
        return real(self, x)

    monkeypatch.setattr(HashDropout, "forward", forward)
    found += [token for _, token in answer]
    assert found == expected
    assert modes
    assert not any(modes)


@pytest.mark.parametrize("opener", ON_CPU)
def test_no_default_of_the_process_changes(
    folder: Path, opener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: object) -> None:
        raise AssertionError("the default device belongs to the program")

    monkeypatch.setattr(mx, "set_default_device", refuse)
    monkeypatch.setattr(mx, "set_default_stream", refuse)
    log = logging.getLogger("transformers")
    log.setLevel(logging.INFO)

    def defaults() -> tuple[object, ...]:
        return (
            *(mx.default_device(), mx.default_stream(mx.cpu)),
            *(torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
            *(torch.get_default_device(), torch._dynamo.config.suppress_errors),
            *(log.level, transformers.utils.logging.is_progress_bar_enabled()),
        )

    before = defaults()
    try:
        engine = opened(folder, opener)
        stream = engine.generate([[5, 6, 7]], Sampling(max_new_tokens=6))
        next(stream)
        assert defaults() == before
        everything(engine)
        engine.close()
        assert defaults() == before
    finally:
        log.setLevel(logging.NOTSET)


def test_stock_tools_leave_the_default_device(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: object) -> None:
        raise AssertionError("the default device belongs to the program")

    monkeypatch.setattr(mx, "set_default_device", refuse)
    for backend in (MlxBackend(), CudaBackend()):
        with pytest.raises(Exception, match=r"adapter|config"):
            backend.stock_logits(folder, tmp_path / "none", np.array([1, 2], np.int32))
