"""A model folder on a shared grid, for both backends, stock mlx-lm and stock transformers.

The two stock tools need different layouts, so two files hold the same words. mlx-lm reads every
model*.safetensors, and transformers reads the file that model.safetensors.index.json names. The
embedding, the head and layers whose inputs are not a multiple of 32 keep their dtype.

Source: compressed-tensors, pack_quantized; MLX, mx.quantize.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phi3_lora.errors import ModelError
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import grid_config
from phi3_lora.models.quantization.grid import GROUP_SIZE, Grid, dequantize, quantize
from phi3_lora.models.writer import write_companions, write_index
from phi3_lora.storage.atomic import replace_folder
from phi3_lora.storage.safetensors import (
    FLOAT_TYPES,
    NewTensor,
    TensorInfo,
    from_float32,
    read_float32,
    read_header,
    read_raw,
    write_streamed,
)

MLX_FILE = "model-00001-of-00001.safetensors"
TRANSFORMERS_FILE = "transformers.safetensors"


@dataclass(frozen=True, slots=True)
class QuantizationError:
    """Difference between the weights on a grid and the original weights."""

    mean: float
    """|difference| / |weight| in the Frobenius norm, over all quantised weights."""
    worst: float
    """|difference| / |weight| of worst_module, where it is largest."""
    worst_module: str


def write_quantized_folder(
    source: Path,
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    target: Path,
    *,
    bits: int,
    for_transformers: bool = True,
) -> QuantizationError:
    """Quantise a model's linear layers into a new folder, one tensor in memory at a time.

    Args:
        source: a folder whose weights were checked.
        config: the parsed config.json of source.
        tensors: the tensors of source, by name.
        target: the new folder; replaced if it exists.
        bits: 4 or 8.
        for_transformers: also write the file for stock transformers.

    Raises:
        ModelError: when source is quantised already, or a grid can store no layer of it.
        StorageError: when the disk is full; target then does not change.
    """
    _check_quantizable(source, config)
    writer = _Writer(config, tensors, bits)

    def fill(folder: Path) -> None:
        dense = [m for m in config.linear_shapes() if m not in config.grid_shapes()]
        write_companions(source, config, folder, grid_config(bits, dense))
        write_streamed(folder / MLX_FILE, writer.for_mlx())
        if for_transformers:
            twin = for_compressed_tensors(read_header(folder / MLX_FILE, ModelError), config)
            write_streamed(folder / TRANSFORMERS_FILE, twin)
            write_index(folder, dict.fromkeys(twin, TRANSFORMERS_FILE))

    replace_folder(target, fill)
    return writer.error()


def _check_quantizable(source: Path, config: ModelConfig) -> None:
    if config.quantization is not None:
        raise ModelError(
            f"{source} is quantised already ({_described(config)}): start from the unquantised "
            "model"
        )
    if not config.grid_shapes():
        raise ModelError(
            f"{source} cannot be quantised: no layer's inputs are a multiple of {GROUP_SIZE}"
        )


def _described(config: ModelConfig) -> str:
    if config.grid_bits is not None:
        return f"shared grid, {config.grid_bits} bits"
    quantization = config.quantization or {}
    method = quantization.get("quant_method", "mlx-lm")
    bits = quantization.get("bits")
    return f"{method}, {bits} bits" if bits else str(method)


class _Writer:
    """Maker of the new file's tensors; it also adds up the quantisation error."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, TensorInfo], bits: int) -> None:
        self._config = config
        self._tensors = tensors
        self._bits = bits
        self._scales: np.ndarray = np.empty(0, np.float32)
        self._squares: dict[str, tuple[float, float]] = {}

    def for_mlx(self) -> dict[str, NewTensor]:
        """Return the tensors under mlx-lm's names: weight (words), scales and biases."""
        found = {}
        shapes = self._config.grid_shapes()
        for name in self._config.tensor_shapes():
            module = name.removesuffix(".weight")
            info = self._tensors[name]
            if module not in shapes:
                found[name] = NewTensor(info.dtype, info.shape, partial(read_raw, info))
                continue
            out_features, in_features = shapes[module]
            words = (out_features, in_features * self._bits // 32)
            groups = (out_features, in_features // GROUP_SIZE)
            # The order of writing matters: scales and biases belong to the words made last.
            found[name] = NewTensor("U32", words, partial(self._words, module))
            found[f"{module}.scales"] = NewTensor("BF16", groups, partial(self._scaled, 1))
            offset = -(2 ** (self._bits - 1))
            found[f"{module}.biases"] = NewTensor("BF16", groups, partial(self._scaled, offset))
        return found

    def _words(self, module: str) -> np.ndarray:
        weight = read_float32(self._tensors[f"{module}.weight"])
        grid = quantize(weight, self._bits)
        self._scales = grid.scales
        gap = float(np.square(dequantize(grid) - weight, dtype=np.float64).sum())
        self._squares[module] = gap, float(np.square(weight, dtype=np.float64).sum())
        return grid.words

    def _scaled(self, factor: int) -> np.ndarray:
        return from_float32(self._scales * np.float32(factor), "BF16")

    def error(self) -> QuantizationError:
        """Return the error of all tensors written so far."""
        relative = {m: (g / max(w, 1e-300)) ** 0.5 for m, (g, w) in self._squares.items()}
        gaps, weights = (sum(column) for column in zip(*self._squares.values(), strict=True))
        worst = max(relative, key=lambda module: relative[module])
        return QuantizationError((gaps / max(weights, 1e-300)) ** 0.5, relative[worst], worst)


def for_compressed_tensors(
    tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> dict[str, NewTensor]:
    """Return the tensors of a grid under the names of compressed-tensors' pack-quantized."""
    found = {}
    shapes = config.grid_shapes()
    for name, info in tensors.items():
        module, _, kind = name.rpartition(".")
        if module not in shapes:
            found[name] = NewTensor(info.dtype, info.shape, partial(read_raw, info))
        elif kind == "weight":
            found[f"{module}.weight_packed"] = NewTensor(
                "I32", info.shape, partial(_signed_words, info)
            )
            found[f"{module}.weight_shape"] = NewTensor(
                "I64", (2,), partial(np.array, shapes[module], np.int64)
            )
        elif kind == "scales":
            found[f"{module}.weight_scale"] = NewTensor(
                info.dtype, info.shape, partial(read_raw, info)
            )
    return found


def _signed_words(info: TensorInfo) -> np.ndarray:
    return read_raw(info).view(np.int32)


def read_grid(tensors: Mapping[str, TensorInfo], module: str) -> Grid:
    """Read the quantised weight of a module."""
    words = np.asarray(read_raw(tensors[f"{module}.weight"]))
    return Grid(words, read_float32(tensors[f"{module}.scales"]))


def dense_weight(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, module: str
) -> NDArray[np.float32]:
    """Read the dense weight of a module in float32.

    Raises:
        ModelError: when the weight is missing, or quantised but not on a shared grid.
    """
    if config.grid_bits is not None and module in config.grid_shapes():
        return dequantize(read_grid(tensors, module))
    info = tensors.get(f"{module}.weight")
    if info is None or info.dtype not in FLOAT_TYPES:
        raise ModelError(f"{module}.weight cannot be read in full from the base model's files")
    return read_float32(info)


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of each tensor in mlx-lm's file of a folder on a shared grid."""
    assert config.grid_bits is not None
    shapes = config.tensor_shapes()
    for module, (out_features, in_features) in config.grid_shapes().items():
        shapes[f"{module}.weight"] = (out_features, in_features * config.grid_bits // 32)
        for name in ("scales", "biases"):
            shapes[f"{module}.{name}"] = (out_features, in_features // GROUP_SIZE)
    return shapes


def grid_problems(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> list[str]:
    """Return the modules whose weights would differ between MLX and PyTorch, as problems."""
    assert config.grid_bits is not None
    problems = []
    for module in config.grid_shapes():
        scales, biases = tensors.get(f"{module}.scales"), tensors.get(f"{module}.biases")
        if scales is None or biases is None or scales.shape != biases.shape:
            continue
        offset = np.float32(-(2 ** (config.grid_bits - 1)))
        if not np.array_equal(read_float32(scales) * offset, read_float32(biases)):
            problems.append(f"{module}.biases: not {offset:g} x scales, so not the shared grid")
    return problems
