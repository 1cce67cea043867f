"""Opening engines on MLX, and what doctor wants to know about it."""

from __future__ import annotations

import os
import sys
import time
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx_lm  # noqa: F401 - a missing package is named here
from phi3_lora.backend import LoadRequest
from phi3_lora.errors import BackendUnavailableError

from phi3_lora_mlx.engine import MlxEngine
from phi3_lora_mlx.model import load_model

SLOW_GFLOPS = 20.0
"""Reference BLAS reaches about 6, OpenBLAS on two cores over 100."""


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
            "problems": [],
        }

    def diagnose(self) -> list[str]:
        """What makes MLX slow here, each with the line that mends it; takes up to a second."""
        if has_gpu() or not sys.platform.startswith("linux"):
            return []
        speed = cpu_matmul_gflops()
        if speed >= SLOW_GFLOPS:
            return []
        return [
            f"MLX multiplies matrices at {speed:.0f} GFLOP/s: it runs on the reference BLAS. "
            "OpenBLAS makes training 10 to 20 times faster: pip install cmeel-openblas"
        ]


def cpu_matmul_gflops(size: int = 512) -> float:
    """Speed of a float32 matrix product on the CPU."""
    with mx.stream(mx.cpu):
        a = mx.random.normal((size, size))
        mx.eval(a @ a)
        began = time.perf_counter()
        mx.eval(a @ a)
    return 2 * size**3 / (time.perf_counter() - began) / 1e9
