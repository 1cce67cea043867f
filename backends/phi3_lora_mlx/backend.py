"""Opening engines on MLX, and what doctor wants to know about it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx_lm  # noqa: F401 - a missing package is named here
import numpy as np

from phi3_lora.backend import LoadRequest
from phi3_lora.errors import BackendUnavailableError
from phi3_lora_mlx.engine import MlxEngine
from phi3_lora_mlx.model import load_model

_SLOW_SHARE = 0.25
"""Of numpy's speed, which brings OpenBLAS; reference BLAS reaches about a twentieth."""


def has_gpu() -> bool:
    """Whether MLX can use a GPU here."""
    return bool(mx.is_available(mx.gpu))


class MlxBackend:
    """MLX with native LoRA layers."""

    name = "mlx"

    def check(self, device: str = "auto") -> None:
        """Make sure that the device exists.

        Raises:
            BackendUnavailableError: when a GPU is asked for and MLX has none.
        """
        if device == "gpu" and not has_gpu():
            raise BackendUnavailableError(
                f"--backend mlx --device gpu: MLX {version('mlx')} has no GPU here; "
                "use --device cpu"
            )

    def open(self, request: LoadRequest) -> MlxEngine:
        """Load a base model and put the LoRA layers on it."""
        self.check(request.device)
        on_gpu = request.device != "cpu" and has_gpu()
        mx.set_default_device(mx.gpu if on_gpu else mx.cpu)
        return MlxEngine(load_model(request, on_gpu=on_gpu), request, on_gpu=on_gpu)

    def describe(self) -> dict[str, Any]:
        """Versions, devices, BLAS and thread count."""
        from phi3_lora_mlx import BLAS

        return {
            "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
            "devices": ["gpu", "cpu"] if has_gpu() else ["cpu"],
            "blas": os.path.basename(BLAS) if BLAS else "built-in",
            "num_threads": int(os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1),
        }

    def diagnose(self) -> list[str]:
        """A slow BLAS under MLX, with the line that mends it; takes up to a second."""
        from phi3_lora_mlx import BLAS

        if BLAS is not None or has_gpu() or not sys.platform.startswith("linux"):
            return []
        own, numpy_speed = cpu_gflops(mlx_product), cpu_gflops(np.matmul)
        if own >= _SLOW_SHARE * numpy_speed:
            return []
        return [
            f"MLX multiplies matrices at {own:.0f} GFLOP/s, numpy at {numpy_speed:.0f}: MLX runs "
            "on the reference BLAS. OpenBLAS makes training 10 to 20 times faster: "
            "pip install cmeel-openblas==0.3.29"
        ]


def mlx_product(a: np.ndarray, b: np.ndarray) -> None:
    """The product of two matrices, on MLX's CPU."""
    with mx.stream(mx.cpu):
        mx.eval(mx.array(a) @ mx.array(b))


def cpu_gflops(multiply: Callable[[np.ndarray, np.ndarray], object], size: int = 512) -> float:
    """Best of five products of float32 matrices, in 10^9 operations a second."""
    matrix = np.ones((size, size), dtype=np.float32)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        multiply(matrix, matrix)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e9
