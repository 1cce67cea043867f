"""The laws for every kind of adapter: equal gradients and runs, and stock PEFT's and mlx-lm's own
answers."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter, with_spec
from phi3_lora.adapters.deltas import Weighted
from phi3_lora.adapters.formats.folder import read_adapter, write_adapter_folder
from phi3_lora.adapters.initialization import initial_weights, row_norms, trained_masks
from phi3_lora.adapters.targets import resolve
from phi3_lora.arrays import Tensors
from phi3_lora.config.adapter import LoraConfig
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.engine.protocol import Batch, Engine
from phi3_lora.engine.request import LoadRequest, OptimSpec, Sampling
from phi3_lora.errors import ModelError
from phi3_lora.export.merge import MergedModel, MergeRequest, merge
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import check_weights, read_model_files
from phi3_lora.storage.safetensors import read_all_float32
from phi3_lora_cuda import CudaBackend
from phi3_lora_mlx import MlxBackend
from tests.backends.test_conformance import open_mlx_padded
from tests.tiny import random_documents, write_model

SLICES = ("q_proj", "v_proj", "up_proj", "o_proj")
SETTINGS = {
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"o_proj": 2, r"1\.mlp\.down_proj": 6},
        alpha_pattern={"gate_up_proj": 3},
    ),
    "outside": LoraConfig(r=4, lora_alpha=8, target_modules=("embed_tokens", "o_proj", "lm_head")),
    "slices": LoraConfig(
        r=4, lora_alpha=8, target_modules=SLICES, layers_to_transform=(1,), use_dora=True
    ),
    "whole": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=("qkv_proj",),
        modules_to_save=("embed_tokens", "lm_head", "norm", "input_layernorm", "down_proj"),
    ),
    "head": LoraConfig(r=4, lora_alpha=8, target_modules=("lm_head",), use_dora=True),
    "dropout": LoraConfig(
        r=4, lora_alpha=8, target_modules=("qkv_proj", "lm_head"), use_dora=True, lora_dropout=0.3
    ),
    "pissa": LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa"),
    "olora": LoraConfig(
        r=4, lora_alpha=8, target_modules=("q_proj", "k_proj"), init_lora_weights="olora"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), num_key_value_heads=2)


def base_weights(folder: Path) -> Tensors:
    return read_all_float32(folder / "model.safetensors", ModelError)


def spec_of(name: str, config: ModelConfig) -> LoraSpec:
    return resolve(SETTINGS[name], config).spec


def start_of(name: str, folder: Path) -> Tensors:
    config = read_model_config(folder)
    base = base_weights(folder)
    return initial_weights(
        spec_of(name, config),
        config.adaptable_shapes(),
        seed=5,
        base=lambda module: base[f"{module}.weight"],
        init=SETTINGS[name].init_lora_weights or True,
    )


def random_values(name: str, folder: Path) -> Tensors:
    """Return weights as after training: those that train are neither 0 nor at their start."""
    rng = np.random.default_rng(0)
    config = read_model_config(folder)
    start, spec, shapes = start_of(name, folder), spec_of(name, config), config.adaptable_shapes()
    masks = trained_masks(spec, shapes)
    values = {}
    for tensor, value in start.items():
        size = 0.3 if ".lora_" in tensor and "magnitude" not in tensor else 0.1
        spread = rng.normal(
            0, size * (value.shape[-1] ** -0.5 if value.ndim == 2 else 1), value.shape
        )
        values[tensor] = (value + spread * masks.get(tensor, True)).astype(np.float32)
    return values


def opened(kind: str, folder: Path, spec: LoraSpec, values: Tensors, **changes: object) -> Engine:
    request = LoadRequest(model=read_model_files(folder), device="cpu", lora=spec, **changes)
    openers = {
        "mlx": MlxBackend().open,
        "mlx-padded": open_mlx_padded,
        "cuda": CudaBackend().open,
    }
    engine = openers[kind](request)
    engine.write_adapter(values)
    return engine


def batch_of(seed: int = 0) -> Batch:
    return make_batch(random_documents([17, 40, 9], seed=seed))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))


@pytest.mark.parametrize("name", SETTINGS)
def test_l4_gradients_are_equal(folder: Path, name: str) -> None:
    config = read_model_config(folder)
    spec = spec_of(name, config)
    values = random_values(name, folder)
    batch = batch_of()
    count = int(batch.loss_mask.sum())
    found = {}
    for kind in ("cuda", "mlx", "mlx-padded"):
        engine = opened(kind, folder, spec, values)
        assert all(np.array_equal(engine.read_adapter()[n], v) for n, v in values.items()), kind
        found[kind] = engine.gradients(batch, loss_tokens=count, step=3)
        small = opened(kind, folder, spec, values, micro_batch_tokens=20)
        alone = small.gradients(batch, loss_tokens=count, step=3)
        assert max(relative(alone[n], g) for n, g in found[kind].items()) <= 1e-5, kind
    assert found["cuda"].keys() == values.keys()
    assert all(gradient.any() for gradient in found["cuda"].values())
    for kind in ("mlx", "mlx-padded"):
        worst = {n: relative(found[kind][n], g) for n, g in found["cuda"].items()}
        assert max(worst.values()) <= 1e-5, (kind, max(worst, key=lambda n: worst[n]))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_l5_runs_are_equal_and_leave_alone_what_does_not_train(
    folder: Path, name: str, optim: str
) -> None:
    config = read_model_config(folder)
    spec, start = spec_of(name, config), start_of(name, folder)
    rule = OptimSpec(name=optim, weight_decay=0.1, lr_ratio=4.0)
    losses: dict[str, list[float]] = {}
    trained: dict[str, Tensors] = {}
    for kind in ("cuda", "mlx"):
        engine = opened(kind, folder, spec, start, optim=rule)
        losses[kind] = []
        for step in range(1, 31):
            batch = batch_of(step % 5)
            count = int(batch.loss_mask.sum())
            result = engine.train_step(batch, loss_tokens=count, lr=2e-3, step=step)
            losses[kind].append(float(result.loss))
        trained[kind] = engine.read_adapter()
    gap = np.abs(np.divide(losses["mlx"], losses["cuda"]) - 1).max()
    assert gap <= 2e-5
    assert losses["cuda"][-1] != losses["cuda"][0]
    for tensors in trained.values():
        for tensor, mask in trained_masks(spec, config.adaptable_shapes()).items():
            still = np.broadcast_to(~mask, tensors[tensor].shape)
            assert np.array_equal(tensors[tensor][still], start[tensor][still]), tensor


@pytest.mark.parametrize("name", SETTINGS)
def test_the_start_changes_nothing(folder: Path, name: str) -> None:
    config = read_model_config(folder)
    spec, start = spec_of(name, config), start_of(name, folder)
    rows = np.arange(60, dtype=np.int32)
    for kind in ("cuda", "mlx"):
        engine = opened(kind, folder, spec, start)
        with engine.base_only():
            expected = engine.logits(batch_of(), rows)
        found = engine.logits(batch_of(), rows)
        assert np.abs(found - expected).max() <= 2e-5 * expected.std(), kind


@pytest.mark.parametrize("name", ["dora", "whole", "outside"])
@pytest.mark.parametrize("kind", ["cuda", "mlx"])
def test_the_base_alone_is_the_base(folder: Path, name: str, kind: str) -> None:
    config = read_model_config(folder)
    spec = spec_of(name, config)
    rows = np.arange(60, dtype=np.int32)
    bare = {"cuda": CudaBackend, "mlx": MlxBackend}[kind]().open(
        LoadRequest(model=read_model_files(folder), device="cpu")
    )
    expected = bare.logits(batch_of(), rows)
    engine = opened(kind, folder, spec, random_values(name, folder))
    before = engine.logits(batch_of(), rows)
    with engine.base_only():
        assert np.array_equal(engine.logits(batch_of(), rows), expected)
    assert np.array_equal(engine.logits(batch_of(), rows), before)
    assert np.abs(before - expected).max() > 0.05 * expected.std()


def adapter_of(name: str, folder: Path) -> Adapter:
    config = read_model_config(folder)
    spec = spec_of(name, config)
    values = random_values(name, folder)
    return with_spec(values, spec, num_layers=config.num_hidden_layers)


@pytest.mark.parametrize("name", SETTINGS)
def test_l6_the_adapter_scores_the_same_in_stock_peft_and_stock_mlx_lm(
    folder: Path, tmp_path: Path, name: str
) -> None:
    adapter = adapter_of(name, folder)
    notes = write_adapter_folder(tmp_path / "a", adapter)
    tokens = random_documents([24])[0].tokens
    batch, rows = make_batch(random_documents([24])), np.arange(24, dtype=np.int32)
    spec = dataclasses.replace(adapter.spec, dropout=0.0)
    ours = {
        k: opened(k, folder, spec, adapter.weights).logits(batch, rows) for k in ("cuda", "mlx")
    }
    expected = CudaBackend().stock_logits(folder, tmp_path / "a", tokens)
    found = dict(ours)
    if not notes:
        found["mlx-lm"] = MlxBackend().stock_logits(folder, tmp_path / "a", tokens)
    for reader, logits in found.items():
        assert np.abs(logits - expected).max() <= 1e-4 * expected.std(), reader
    assert ["whole weights" in note for note in notes] == [True] * (name == "whole")


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_into_the_base_it_answers_the_same(folder: Path, tmp_path: Path, name: str) -> None:
    config = read_model_config(folder)
    adapter = adapter_of(name, folder)
    part = Weighted(adapter, 1.0)
    found = merge(
        MergeRequest(
            source=folder,
            config=config,
            tensors=check_weights(folder, config),
            parts=[part],
            target=tmp_path / "m",
        )
    )
    assert isinstance(found, MergedModel)
    assert min(kept.cosine for kept in found.survival.values()) > 0.99999
    assert set(found.survival) == {*adapter.modules, *adapter.saved}
    spec = dataclasses.replace(adapter.spec, dropout=0.0)
    rows = np.arange(60, dtype=np.int32)
    for kind, backend in (("cuda", CudaBackend), ("mlx", MlxBackend)):
        expected = opened(kind, folder, spec, adapter.weights).logits(batch_of(), rows)
        merged = backend().open(LoadRequest(model=read_model_files(tmp_path / "m"), device="cpu"))
        logits = merged.logits(batch_of(), rows)
        assert np.abs(logits - expected).max() <= 1e-4 * expected.std(), kind


@pytest.mark.parametrize("kind", ["cuda", "mlx"])
def test_generation_with_every_kind_equals_whole_sequences(folder: Path, kind: str) -> None:
    """Decoding uses the cached norms of DoRA and the adapted embedding and head."""
    prompt = random_documents([9])[0].tokens.tolist()
    for name in ("dora", "outside", "whole"):
        adapter = adapter_of(name, folder)
        engine = opened(kind, folder, adapter.spec, adapter.weights)
        found = [i for _, i in engine.generate([prompt], Sampling(max_new_tokens=6))]
        ids = list(prompt)
        for token in found:
            tokens = np.array(ids, np.int32)
            batch = make_batch([Document(tokens, np.ones(len(ids), bool), "x")])
            logits = engine.logits(batch, np.array([len(ids) - 1], np.int32))[0]
            assert logits[token] >= logits.max() - 2e-4 * logits.std(), name
            ids.append(token)


STOCK = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 5}},
    "tail": {"layers_to_transform": [1]},
    "outside": {"target_modules": ["embed_tokens", "o_proj", "lm_head"]},
    "saved": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("name", STOCK)
def test_gradients_and_answers_equal_stock_peft_for_its_own_adapter(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """An adapter of PEFT, read here, has the loss and the gradients that PEFT computes."""
    import peft
    import torch
    from transformers import Phi3ForCausalLM

    settings = {
        "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        **STOCK[name],
    }
    base = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            base, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
        )
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert any("copy of the base's own" in note for note in adapter.notes) == (name == "outside")
    document = random_documents([24])[0]
    ids = torch.from_numpy(document.tokens).long()[None]
    labels = torch.where(torch.from_numpy(document.supervised), ids, -100)
    model(input_ids=ids, labels=labels).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = peft.get_peft_model_state_dict(model, gradients, save_embedding_layers=False)
    batch = make_batch([document])
    for kind in ("cuda", "mlx"):
        engine = opened(kind, folder, adapter.spec, adapter.weights)
        found = engine.gradients(batch, loss_tokens=int(batch.loss_mask.sum()))
        for tensor, gradient in found.items():
            other = expected[tensor].numpy()
            if "embedding_A" in tensor:
                # transformers gives no gradient to the row of the padding token, <|endoftext|>.
                gradient = np.delete(gradient, 256, axis=1)
                other = np.delete(other, 256, axis=1)
            assert relative(gradient, other) <= 1e-5, (kind, tensor)


@pytest.mark.parametrize("kind", ["cuda", "mlx"])
def test_dora_and_whole_weights_on_a_quantised_base(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    """Norms and starting values come from the quantised weights of the base."""
    from phi3_lora.models.quantization.folder import dense_weight, write_quantized_folder
    from phi3_lora.models.weights import check_weights, tensor_index

    config = read_model_config(folder)
    target = tmp_path / "q"
    write_quantized_folder(folder, config, check_weights(folder, config), target, bits=4)
    quantised = read_model_config(target)
    settings = LoraConfig(r=4, lora_alpha=8, use_dora=True, modules_to_save=("norm",))
    spec = resolve(settings, quantised).spec
    tensors = tensor_index(target, quantised)
    start = initial_weights(
        spec,
        quantised.adaptable_shapes(),
        seed=0,
        base=lambda module: dense_weight(tensors, quantised, module),
    )
    first = next(iter(spec.layers))
    dense = dense_weight(tensors, quantised, first)
    assert not np.array_equal(row_norms(dense), row_norms(base_weights(folder)[f"{first}.weight"]))
    engine = opened(kind, target, spec, start)
    rows = np.arange(60, dtype=np.int32)
    with engine.base_only():
        expected = engine.logits(batch_of(), rows)
    assert np.abs(engine.logits(batch_of(), rows) - expected).max() <= 2e-5 * expected.std()
