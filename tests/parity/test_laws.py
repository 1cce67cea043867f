"""The laws on tiny random models in float32 on the CPU: L1, L2, L4, L5, L6, L7."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.folder import write_adapter_folder
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.request import LoadRequest, OptimSpec, Sampling
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import read_model_files
from phi3_lora_cuda import CudaBackend
from phi3_lora_mlx import MlxBackend
from tests.tiny import lora_spec, random_adapter, random_documents, start_weights, write_model

LENGTHS = [1, 2, 17, 40, 9, 30]
BACKENDS = {"mlx": MlxBackend, "cuda": CudaBackend}


def open_both(folder: Path, **changes: object) -> dict:
    config = read_model_config(folder)
    request = LoadRequest(
        model=read_model_files(folder), device="cpu", lora=lora_spec(config), **changes
    )
    engines = {name: kind().open(request) for name, kind in BACKENDS.items()}
    weights = random_adapter(config.linear_shapes(), r=4)
    for engine in engines.values():
        engine.write_adapter(weights)
    return engines


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain"))


def test_l1_base_logits_equal_transformers_for_each_document_alone(plain: Path) -> None:
    import torch
    from transformers import Phi3ForCausalLM

    reference = Phi3ForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    documents = random_documents(LENGTHS)
    with torch.no_grad():
        expected = np.concatenate(
            [
                reference(torch.from_numpy(d.tokens).long()[None]).logits[0].numpy()
                for d in documents
            ]
        )
    batch = make_batch(documents)
    for name, engine in open_both(plain).items():
        with engine.base_only():
            logits = engine.logits(batch, np.arange(len(batch.tokens), dtype=np.int32))
        assert np.abs(logits - expected).max() <= 1e-4 * expected.std(), name


def test_l2_start_is_pinned() -> None:
    shapes = {"model.layers.0.self_attn.o_proj": (3, 4)}
    first = start_weights(shapes, r=2, seed=7)
    second = start_weights(shapes, r=2, seed=7)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    a = first["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"]
    assert a.dtype == np.float32 and np.abs(a).max() <= 0.5 and len(np.unique(a)) == 8


@pytest.mark.parametrize("vocab_size", [264, 32_064, 200_064])
def test_l4_loss_and_gradients_are_equal(tmp_path: Path, vocab_size: int) -> None:
    folder = write_model(tmp_path / "m", vocab_size=vocab_size)
    batch = make_batch(random_documents([17, 40, 9], vocab_size=vocab_size))
    count = int(batch.loss_mask.sum())
    engines = open_both(folder)
    found = {n: e.gradients(batch, loss_tokens=count) for n, e in engines.items()}
    for name, value in found["cuda"].items():
        assert relative(found["mlx"][name], value) <= 1e-5, name
    losses = [
        float(e.train_step(batch, loss_tokens=count, lr=1e-3, step=1).loss)
        for e in engines.values()
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)


def trace(engine, optim: str, steps: int) -> list[float]:
    losses = []
    for step in range(1, steps + 1):
        batch = make_batch(random_documents([12, 20], seed=step % 10))
        count = int(batch.loss_mask.sum())
        losses.append(float(engine.train_step(batch, loss_tokens=count, lr=5e-3, step=step).loss))
    return losses


GATES = {"adamw": 2e-5, "sgd": 4e-6}


@pytest.mark.parametrize("name", GATES)
def test_l5_a_hundred_steps_are_equal(plain: Path, name: str) -> None:
    optim = OptimSpec(name=name, weight_decay=0.01)
    mlx, cuda = (trace(e, name, 100) for e in open_both(plain, optim=optim).values())
    assert np.max(np.abs(np.divide(mlx, cuda) - 1)) <= GATES[name]


@pytest.mark.parametrize(
    "bug",
    [
        OptimSpec(weight_decay=0.0),
        OptimSpec(weight_decay=0.1, eps=1e-6),
        OptimSpec(weight_decay=0.1, max_grad_norm=0.0),
    ],
    ids=["no-decay", "eps", "no-clipping"],
)
def test_l5_finds_a_planted_bug(plain: Path, bug: OptimSpec) -> None:
    right = OptimSpec(weight_decay=0.1)
    one = trace(open_both(plain, optim=right)["cuda"], "adamw", 100)
    other = trace(open_both(plain, optim=bug)["mlx"], "adamw", 100)
    assert np.max(np.abs(np.divide(one, other) - 1)) > GATES["adamw"]


def test_l6_the_adapter_scores_the_same_in_stock_peft_and_stock_mlx_lm(
    plain: Path, tmp_path: Path
) -> None:
    import mlx.core as mx
    import torch
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model
    from peft import PeftModel
    from transformers import Phi3ForCausalLM

    config = read_model_config(plain)
    weights = random_adapter(config.linear_shapes(), r=4)
    adapter = Adapter(weights=weights, r=4, lora_alpha=8.0, num_layers=config.num_hidden_layers)
    write_adapter_folder(tmp_path / "a", adapter)
    tokens = random_documents([24])[0].tokens
    batch = make_batch(random_documents([24]))
    rows = np.arange(24, dtype=np.int32)
    ours = {name: e.logits(batch, rows) for name, e in open_both(plain).items()}
    base = Phi3ForCausalLM.from_pretrained(plain, dtype=torch.float32)
    stock_peft = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    with torch.no_grad():
        expected = stock_peft(torch.from_numpy(tokens).long()[None]).logits[0].numpy()
    model, _ = load_model(plain)
    stock_mlx = load_adapters(model, str(tmp_path / "a"))
    stock_mlx.eval()
    found = np.array(stock_mlx(mx.array(tokens)[None])[0])
    for logits in (*ours.values(), found):
        assert np.abs(logits - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", BACKENDS)
def test_l7_gradients_do_not_depend_on_batching_or_micro_batches(plain: Path, name: str) -> None:
    documents = random_documents([12, 20, 7, 33])
    count = sum(d.loss_tokens for d in documents)
    whole = open_both(plain)[name].gradients(make_batch(documents), loss_tokens=count)
    small = open_both(plain, micro_batch_tokens=20)[name]
    split = small.gradients(make_batch(documents[::-1]), loss_tokens=count)
    alone = [small.gradients(make_batch([d]), loss_tokens=count) for d in documents]
    for key, value in whole.items():
        assert relative(split[key], value) <= 1e-5
        assert relative(sum(part[key] for part in alone), value) <= 1e-5


def test_greedy_tokens_are_equal_and_match_whole_sequences(plain: Path) -> None:
    prompt = random_documents([10])[0].tokens.tolist()
    found = {
        name: list(engine.generate([prompt], Sampling(max_new_tokens=12)))
        for name, engine in open_both(plain).items()
    }
    assert found["mlx"] == found["cuda"]


def test_config_json_of_the_adapter_holds_both_tools_keys(tmp_path: Path, plain: Path) -> None:
    config = read_model_config(plain)
    weights = random_adapter(config.linear_shapes(), r=4)
    adapter = Adapter(weights=weights, r=4, lora_alpha=8.0, num_layers=config.num_hidden_layers)
    write_adapter_folder(tmp_path / "a", adapter)
    stored = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert stored["r"] == 4 and stored["lora_parameters"]["scale"] == 2.0
