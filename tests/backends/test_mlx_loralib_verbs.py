"""loralib's functions in MLX, compared with loralib in torch: training, saving, loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch_lora = pytest.importorskip("loralib")
lora = pytest.importorskip("phi3_lora_mlx")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from phi3_lora.adapters.formats.torch_pickle import encode_torch_file, read_torch_file  # noqa: E402
from phi3_lora.errors import AdapterError, ConfigError  # noqa: E402
from phi3_lora_mlx.loralib import to_numpy  # noqa: E402
from tests.backends.test_mlx_loralib import (  # noqa: E402
    IN,
    VOCABULARY,
    assert_close,
    inputs,
    randomise,
    seeded_cpu,  # noqa: F401 - of every test here too
)


class Net(nn.Module):
    """A nested model with every kind of LoRA layer and plain layers between them."""

    def __init__(self, r: int = 3) -> None:
        super().__init__()
        options = {"r": r, "lora_alpha": 6}
        self.embed = lora.Embedding(VOCABULARY, IN, **options)
        self.layers = [
            lora.MergedLinear(IN, 3 * IN, **options, enable_lora=[True, False, True]),
            lora.Linear(3 * IN, IN, **options),
        ]
        self.norm = nn.LayerNorm(IN)
        self.head = nn.Linear(IN, VOCABULARY)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.embed(x)
        for layer in self.layers:
            y = nn.silu(layer(y))
        return self.head(self.norm(y))


class TorchNet(torch.nn.Module):
    """A model with the same structure, made of loralib's layers."""

    def __init__(self) -> None:
        super().__init__()
        options = {"r": 3, "lora_alpha": 6}
        self.embed = torch_lora.Embedding(VOCABULARY, IN, **options)
        self.layers = torch.nn.ModuleList(
            [
                torch_lora.MergedLinear(IN, 3 * IN, **options, enable_lora=[True, False, True]),
                torch_lora.Linear(3 * IN, IN, **options),
            ]
        )
        self.norm = torch.nn.LayerNorm(IN)
        self.head = torch.nn.Linear(IN, VOCABULARY)

    def forward(self, x: Any) -> Any:
        y = self.embed(x)
        for layer in self.layers:
            y = torch.nn.functional.silu(layer(y))
        return self.head(self.norm(y))


LORA_NAMES = {
    f"{module}.lora_{factor}"
    for module in ("embed", "layers.0", "layers.1")
    for factor in ("A", "B")
}
LORA_BIASES = {"layers.0.bias", "layers.1.bias"}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_what_is_trained_and_what_is_saved_is_what_loralib_says(bias: str) -> None:
    ours, theirs = Net(), TorchNet()
    lora.mark_only_lora_as_trainable(ours, bias)
    torch_lora.mark_only_lora_as_trainable(theirs, bias)
    trainable = {name for name, _ in tree_flatten(ours.trainable_parameters())}
    assert trainable == {n for n, p in theirs.named_parameters() if p.requires_grad}
    saved = set(lora.lora_state_dict(ours, bias))
    assert saved == set(torch_lora.lora_state_dict(theirs, bias)) == trainable
    extra = {
        "none": set(),
        "all": LORA_BIASES | {"norm.bias", "head.bias"},
        "lora_only": LORA_BIASES,
    }
    assert saved == LORA_NAMES | extra[bias]


def test_a_quantised_layers_offsets_are_no_bias() -> None:
    net = nn.Sequential(lora.Linear(64, 64, r=2), nn.Linear(64, 64))
    net.layers[1] = net.layers[1].to_quantized(group_size=32, bits=4)
    assert "layers.1.biases" in dict(tree_flatten(net.parameters()))
    expected = {f"layers.{name}" for name in ("0.lora_A", "0.lora_B", "0.bias", "1.bias")}
    assert set(lora.lora_state_dict(net, "all")) == expected
    lora.mark_only_lora_as_trainable(net, "all")
    assert {name for name, _ in tree_flatten(net.trainable_parameters())} == expected


def loss(net: nn.Module, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(net(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_steps_of_an_optimizer_change_what_is_marked_and_nothing_else(bias: str) -> None:
    net = Net()
    lora.mark_only_lora_as_trainable(net, bias)
    optimizer = optim.AdamW(learning_rate=1e-2, weight_decay=0.1)
    before = dict(tree_flatten(net.parameters()))
    tokens = mx.array(inputs("Embedding"))
    step = nn.value_and_grad(net, lambda tokens: loss(net, tokens))
    losses = []
    for _ in range(5):
        value, gradients = step(tokens)
        optimizer.update(net, gradients)
        losses.append(value.item())
    after = dict(tree_flatten(net.parameters()))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed == LORA_NAMES | (LORA_BIASES if bias == "lora_only" else set())
    assert losses[-1] < losses[0]


def test_a_compiled_step_is_the_plain_one() -> None:
    nets = [Net(), Net()]
    nets[1].update(nets[0].parameters())
    tokens = mx.array(inputs("Embedding"))
    losses = []
    for net, compile_ in zip(nets, (False, True), strict=True):
        lora.mark_only_lora_as_trainable(net)
        optimizer = optim.SGD(learning_rate=0.1)
        gradients_of = nn.value_and_grad(net, lambda tokens, net=net: loss(net, tokens))

        def step(
            tokens: mx.array, net: Net = net, run: Callable = gradients_of, rule: Any = optimizer
        ) -> mx.array:
            value, gradients = run(tokens)
            rule.update(net, gradients)
            return value

        state = [net.state, optimizer.state]
        take = mx.compile(step, inputs=state, outputs=state) if compile_ else step
        losses.append([take(tokens).item() for _ in range(3)])
    assert losses[0][2] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_adapters_move_between_torch_and_mlx_both_ways(tmp_path: Path) -> None:
    theirs, ours = TorchNet(), Net()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    x = inputs("Embedding")
    expected = theirs(torch.from_numpy(x)).detach()
    torch.save({n: v for n, v in theirs.state_dict().items() if "lora_" not in n}, tmp_path / "b")
    torch.save(torch_lora.lora_state_dict(theirs), tmp_path / "a")
    base = lora.load_lora_state_dict(ours, read_torch_file(tmp_path / "b"))
    assert set(base.missing_keys) == LORA_NAMES and not base.unexpected_keys
    adapter = lora.load_lora_state_dict(ours, read_torch_file(tmp_path / "a"), strict=True)
    assert adapter == ([], [])
    assert_close(ours(mx.array(x)), expected)
    ours.set_dtype(mx.bfloat16)
    ours.set_dtype(mx.float32)
    (tmp_path / "c").write_bytes(encode_torch_file(to_numpy(lora.lora_state_dict(ours))))
    state = torch.load(tmp_path / "c", weights_only=True)
    found = theirs.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and set(state) == LORA_NAMES
    for name, value in lora.lora_state_dict(ours).items():
        assert np.array_equal(theirs.state_dict()[name].numpy(), np.array(value))


def test_half_precision_states_are_written_as_float32(tmp_path: Path) -> None:
    net = Net()
    net.set_dtype(mx.bfloat16)
    (tmp_path / "x.pt").write_bytes(encode_torch_file(to_numpy(lora.lora_state_dict(net))))
    again = Net()
    again.set_dtype(mx.bfloat16)
    lora.load_lora_state_dict(again, read_torch_file(tmp_path / "x.pt"))
    for name, value in lora.lora_state_dict(net).items():
        found = lora.lora_state_dict(again)[name]
        assert found.dtype == mx.bfloat16 and mx.array_equal(found, value)


def test_loading_into_a_merged_model_merges_again() -> None:
    source, target = Net(), Net()
    randomise(source)
    randomise(target)
    x = mx.array(inputs("Embedding"))
    expected = source(x)
    target.eval()
    state = dict(tree_flatten(source.parameters()))
    lora.load_lora_state_dict(target, state)
    assert target.layers[1].merged
    assert_close(target(x), expected)
    target.train()
    assert mx.array_equal(target.layers[1].weight, source.layers[1].weight)
    assert_close(target(x), expected)


def test_the_rest_of_a_state_is_told_and_left_aside() -> None:
    net = Net()
    before = dict(tree_flatten(net.parameters()))
    state = {"layers.1.lora_A": np.ones((3, 3 * IN), np.float32), "other.lora_A": np.ones((1, 1))}
    found = lora.load_lora_state_dict(net, state)
    assert found.unexpected_keys == ["other.lora_A"]
    assert set(found.missing_keys) == LORA_NAMES - {"layers.1.lora_A"}
    after = dict(tree_flatten(net.parameters()))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed == {"layers.1.lora_A"}


def test_a_state_that_does_not_fit_is_one_error_and_changes_nothing() -> None:
    net = Net()
    before = dict(tree_flatten(net.parameters()))
    good = np.ones((3, 3 * IN), np.float32)
    cases: list[tuple[dict[str, Any], bool, str]] = [
        ({"layers.1.lora_A": good[:2]}, False, r"layers.1.lora_A: \(2, 72\), but \(3, 72\)"),
        ({"layers.1.lora_A": good * np.nan}, False, "layers.1.lora_A: not finite"),
        ({"layer.1.lora_A": good}, False, "layer.1.lora_A: not in the model"),
        ({}, False, "it is empty"),
        ({"layers.1.lora_A": good}, True, "embed.lora_B: missing in the state"),
        ({**lora.lora_state_dict(net), "x": good}, True, "x: not in the model"),
    ]
    for state, strict, phrase in cases:
        with pytest.raises(AdapterError, match=phrase):
            lora.load_lora_state_dict(net, state, strict=strict)
    after = dict(tree_flatten(net.parameters()))
    assert all(mx.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (
            lambda: lora.mark_only_lora_as_trainable(Net(), "some"),
            "one of none, all, lora_only; got 'some'",
        ),
        (lambda: lora.lora_state_dict(Net(), bias="lora"), "one of none, all, lora_only"),
        (lambda: lora.mark_only_lora_as_trainable(Net(r=0)), "no LoRA array"),
        (lambda: lora.lora_state_dict(nn.Linear(2, 2)), "no LoRA array"),
    ],
)
def test_mistakes_are_told(make: Callable[[], object], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        make()
