"""loralib's layers in MLX, compared with loralib in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch_lora = pytest.importorskip("loralib")
lora = pytest.importorskip("phi3_lora_mlx")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from phi3_lora.adapters.formats.loralib import from_loralib  # noqa: E402
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata  # noqa: E402
from phi3_lora.adapters.formats.torch_pickle import read_torch_file  # noqa: E402
from phi3_lora.errors import ConfigError  # noqa: E402
from phi3_lora_mlx.loralib import to_numpy  # noqa: E402

IN, OUT, VOCABULARY = 24, 36, 29
SOME = {"r": 3, "lora_alpha": 5}
LAYERS: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "Linear": ("Linear", (IN, OUT), SOME),
    "Linear without bias": ("Linear", (IN, OUT), {**SOME, "bias": False}),
    "Linear fan_in_fan_out": ("Linear", (IN, OUT), {**SOME, "fan_in_fan_out": True}),
    "Embedding": ("Embedding", (VOCABULARY, IN), SOME),
    "MergedLinear q, v": ("MergedLinear", (IN, OUT), {**SOME, "enable_lora": [True, False, True]}),
    "MergedLinear v": ("MergedLinear", (IN, OUT), {**SOME, "enable_lora": [False, False, True]}),
    "MergedLinear all": ("MergedLinear", (IN, OUT), {**SOME, "enable_lora": [True] * 3}),
    "MergedLinear fan_in_fan_out": (
        *("MergedLinear", (IN, OUT)),
        {**SOME, "enable_lora": [True, False, True], "fan_in_fan_out": True},
    ),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture(autouse=True)
def seeded_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    torch.manual_seed(0)
    yield
    mx.set_default_device(before)


def torch_layer(kind: str, **changes: Any) -> Any:
    """Make a layer of loralib with random A and B."""
    name, shape, options = LAYERS[kind]
    layer = getattr(torch_lora, name)(*shape, **options, **changes)
    for path, parameter in layer.named_parameters():
        if "lora_" in path:
            torch.nn.init.normal_(parameter)
    return layer


def mlx_layer(kind: str, **changes: Any) -> Any:
    name, shape, options = LAYERS[kind]
    return getattr(lora, name)(*shape, **options, **changes)


def randomise(model: nn.Module) -> None:
    """Fill A and B with random values, because one of them starts as zero."""
    state = lora.lora_state_dict(model)
    lora.load_lora_state_dict(model, {n: mx.random.normal(v.shape) for n, v in state.items()})


def inputs(kind: str) -> np.ndarray:
    draw = np.random.default_rng(1)
    if kind == "Embedding":
        return draw.integers(0, VOCABULARY, (2, 7))
    return draw.standard_normal((2, 7, IN), dtype=np.float32)


def loaded(kind: str, layer: Any, folder: Path, **changes: Any) -> Any:
    """Load the whole state of a loralib layer into our layer, through a .pt file of torch."""
    torch.save(layer.state_dict(), folder / "x.pt")
    ours = mlx_layer(kind, **changes)
    found = lora.load_lora_state_dict(ours, read_torch_file(folder / "x.pt"), strict=True)
    assert found.missing_keys == found.unexpected_keys == []
    return ours


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Return the relative L2 distance."""
    found, expected = np.array(found), np.array(expected)
    assert found.shape == expected.shape and np.linalg.norm(expected) > 0
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@every_layer
def test_output_and_gradients_are_those_of_loralib(kind: str, tmp_path: Path) -> None:
    theirs = torch_layer(kind)
    ours = loaded(kind, theirs, tmp_path)
    x = inputs(kind)
    y = theirs(torch.from_numpy(x))
    y.sin().sum().backward()
    assert_close(ours(mx.array(x)), y.detach())
    _, gradients = nn.value_and_grad(ours, lambda x: ours(x).sin().sum())(mx.array(x))
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys() >= {"lora_A", "lora_B"}
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name])


@every_layer
def test_eval_merges_as_loralib_does_and_changes_no_output(kind: str, tmp_path: Path) -> None:
    theirs = torch_layer(kind)
    ours = loaded(kind, theirs, tmp_path)
    x = mx.array(inputs(kind))
    unmerged, weight = ours(x), ours.weight
    names = set(ours.parameters())
    ours.eval()
    theirs.eval()
    assert ours.merged and set(ours.parameters()) == names
    assert_close(ours.weight, theirs.weight.detach())
    assert_close(ours(x), unmerged)
    # Only the merged weight gives the output: A and B are not added a second time.
    ours.lora_B = mx.zeros_like(ours.lora_B)
    assert_close(ours(x), unmerged)
    ours.train()
    assert not ours.merged and mx.array_equal(ours.weight, weight)


@every_layer
def test_merge_weights_false_leaves_the_weight_alone(kind: str) -> None:
    ours = mlx_layer(kind, merge_weights=False)
    randomise(ours)
    weight, x = ours.weight, mx.array(inputs(kind))
    y = ours(x)
    ours.eval()
    assert not ours.merged and mx.array_equal(ours.weight, weight) and mx.array_equal(ours(x), y)


@every_layer
def test_shapes_names_and_start_are_those_of_loralib(kind: str) -> None:
    name, shape, options = LAYERS[kind]
    theirs = getattr(torch_lora, name)(*shape, **options)
    ours = mlx_layer(kind)
    found = {name: tuple(value.shape) for name, value in tree_flatten(ours.parameters())}
    assert found == {name: tuple(value.shape) for name, value in theirs.named_parameters()}
    trainable = {name for name, _ in tree_flatten(ours.trainable_parameters())}
    assert trainable == {n for n, p in theirs.named_parameters() if p.requires_grad}
    for key in ("lora_A", "lora_B"):
        is_zero = not getattr(theirs, key).any()
        assert (not ours[key].any().item()) == is_zero, key


def test_random_starts_have_the_spread_of_loralib() -> None:
    for ours, theirs in (
        (lora.Linear(100, 8, r=64).lora_A, torch_lora.Linear(100, 8, r=64).lora_A),
        (
            lora.MergedLinear(100, 8, r=64, enable_lora=[True, False]).lora_A,
            torch_lora.MergedLinear(100, 8, r=64, enable_lora=[True, False]).lora_A,
        ),
        (lora.Embedding(8, 100, r=64).lora_B, torch_lora.Embedding(8, 100, r=64).lora_B),
    ):
        assert abs(ours.std().item() / theirs.std().item() - 1) < 0.05
        uniform = theirs.abs().max().item() < 0.2
        assert (mx.abs(ours).max().item() <= 0.1 + 1e-6) == uniform


def test_rank_0_is_a_plain_layer() -> None:
    layers = [lora.Linear(4, 6), lora.Embedding(4, 6), lora.MergedLinear(4, 6)]
    for layer in [*layers, lora.MergedLinear(4, 6, r=2, enable_lora=[False, False])]:
        assert "weight" in dict(tree_flatten(layer.trainable_parameters()))
        assert not any("lora_" in name for name, _ in tree_flatten(layer.parameters()))
        x = mx.array([1, 3]) if isinstance(layer, lora.Embedding) else mx.ones((2, 4))
        y = layer(x)
        layer.eval()
        assert mx.array_equal(layer(x), y) and y.shape == (2, 6)


def test_unequal_parts_are_linears_of_their_own() -> None:
    """Cut q, k, v of a model with half as many key-value heads as heads."""
    sizes, enabled = [16, 8, 8], [True, False, True]
    fused = lora.MergedLinear(IN, 32, **SOME, enable_lora=enabled, sizes=sizes, bias=False)
    assert fused.lora_A.shape == (6, IN) and fused.lora_B.shape == (24, 3)
    assert fused.sizes == sizes and fused.enable_lora == enabled
    randomise(fused)
    x = mx.array(inputs("Linear"))
    q, k, v = (lora.Linear(IN, size, **SOME, bias=False) for size in sizes)
    q.weight, k.weight, v.weight = mx.split(fused.weight, [16, 24])
    (q.lora_A, v.lora_A), (q.lora_B, v.lora_B) = (
        mx.split(fused.lora_A, 2),
        mx.split(fused.lora_B, [16]),
    )
    expected = mx.concatenate([layer(x) for layer in (q, k, v)], axis=-1)
    assert_close(fused(x), expected)
    fused.eval()
    assert_close(fused(x), expected)


def test_dropout_is_on_the_input_of_lora_and_in_training_alone() -> None:
    for layer in (
        lora.Linear(64, 64, r=64, lora_alpha=64, lora_dropout=0.25, bias=False),
        lora.MergedLinear(
            *(64, 64), r=64, lora_alpha=64, lora_dropout=0.25, enable_lora=[True], bias=False
        ),
    ):
        layer.weight = mx.zeros((64, 64))
        layer.lora_A = layer.lora_B = mx.eye(64)
        y = np.array(layer(mx.ones((50, 64))))
        kept = np.isclose(y, 1 / 0.75)
        assert np.all(kept | (y == 0)) and abs(kept.mean() - 0.75) < 0.05
        layer.merge_weights = False
        layer.eval()
        assert np.array_equal(layer(mx.ones((50, 64))), np.ones((50, 64)))


def test_a_tied_head_has_the_embeddings_lora() -> None:
    layer = lora.Embedding(VOCABULARY, IN, **SOME)
    randomise(layer)
    x = mx.array(inputs("Linear"))
    unmerged = layer.as_linear(x)
    assert_close(unmerged, x @ (layer.weight + layer.delta()).T)
    layer.eval()
    assert_close(layer.as_linear(x), unmerged)


@pytest.mark.parametrize("kind", ["Linear", "Embedding", "MergedLinear q, v"])
def test_half_precision_stays_and_merging_leaves_the_base_bit_for_bit(kind: str) -> None:
    layer = mlx_layer(kind)
    randomise(layer)
    layer.weight = layer.weight.astype(mx.bfloat16)
    if "bias" in layer:
        layer.bias = layer.bias.astype(mx.bfloat16)
    x = mx.array(inputs(kind))
    x = x if kind == "Embedding" else x.astype(mx.bfloat16)
    weight = layer.weight
    for _ in range(3):
        assert layer(x).dtype == mx.bfloat16
        layer.eval()
        assert layer(x).dtype == mx.bfloat16 and not mx.array_equal(layer.weight, weight)
        layer.train()
    assert mx.array_equal(layer.weight, weight)


def test_a_saved_merged_linear_has_the_delta_that_convert_reads() -> None:
    layer = lora.MergedLinear(IN, OUT, **SOME, enable_lora=[True, False, True])
    randomise(layer)
    path = "model.layers.0.self_attn.qkv_proj"
    state = {f"{path}.{name}": v for name, v in to_numpy(lora.lora_state_dict(layer)).items()}
    adapter = from_loralib(state, MissingMetadata(5.0, enable=("q", "v")), "x.pt")
    assert_close(adapter.delta(path), layer.delta())


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (lambda: lora.Linear(4, 6, r=-1), "r must be a whole number >= 0, got -1"),
        (lambda: lora.Linear(4, 6, r=1.5), "r must be a whole number >= 0, got 1.5"),
        (lambda: lora.Embedding(4, 6, r=-2), "r must be a whole number >= 0, got -2"),
        (lambda: lora.Linear(4, 6, r=1, lora_alpha=0), "lora_alpha must be a number above 0"),
        (lambda: lora.Linear(4, 6, r=1, lora_alpha=float("nan")), "above 0, got nan"),
        (lambda: lora.Linear(4, 6, r=1, lora_alpha="2"), "above 0, got '2'"),
        (lambda: lora.Linear(4, 6, r=1, lora_dropout=1.0), "lora_dropout must be from 0"),
        (lambda: lora.MergedLinear(4, 7, r=1, enable_lora=[True] * 3), "do not divide .* 7"),
        (lambda: lora.MergedLinear(4, 7, r=1, enable_lora=[]), "0 parts"),
        (
            lambda: lora.MergedLinear(4, 7, r=1, enable_lora=[True] * 2, sizes=[4, 2]),
            r"the sum out_features = 7; got \[4, 2\]",
        ),
        (
            lambda: lora.MergedLinear(4, 7, r=1, enable_lora=[True] * 3, sizes=[4, 3]),
            "sizes must be 3 numbers",
        ),
        (
            lambda: lora.MergedLinear(4, 7, r=1, enable_lora=[True] * 2, sizes=[8, -1]),
            "sizes must be 2 numbers above 0",
        ),
        (lambda: nn.quantize(nn.Sequential(lora.Linear(64, 64, r=1))), "LoRA would be lost"),
        (lambda: nn.quantize(nn.Sequential(lora.Embedding(64, 64, r=1))), "LoRA would be lost"),
    ],
)
def test_mistakes_are_told(make: Callable[[], object], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        make()


def test_a_layer_without_lora_can_be_quantised() -> None:
    net = nn.Sequential(lora.Linear(64, 64), lora.Embedding(64, 64))
    nn.quantize(net, group_size=32, bits=4)
    assert isinstance(net.layers[0], nn.QuantizedLinear)
    assert isinstance(net.layers[1], nn.QuantizedEmbedding)
