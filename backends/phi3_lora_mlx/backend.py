"""The MLX backend: it opens engines and describes this machine for `doctor`."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model as load_with_mlx_lm

from phi3_lora.arrays import Float32, Int32
from phi3_lora.engine.protocol import BackendDescription
from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import AdapterError, BackendUnavailableError
from phi3_lora_mlx.blas import OPENBLAS_WHEEL, uses_reference_blas
from phi3_lora_mlx.engine import MlxEngine
from phi3_lora_mlx.model import load_model


def has_gpu() -> bool:
    """Return whether MLX can use a GPU here."""
    return bool(mx.is_available(mx.gpu))


class MlxBackend:
    """MLX with native LoRA layers."""

    name = "mlx"
    quantizations = frozenset({"mlx-affine"})
    stock_tool = "mlx-lm"
    stock_layout = "mlx"

    def check(self, device: str = "auto") -> None:
        """Check that the device exists.

        Raises:
            BackendUnavailableError: when a GPU is requested and MLX has no GPU.
        """
        if device == "gpu" and not has_gpu():
            raise BackendUnavailableError(
                f"--backend mlx --device gpu: MLX {version('mlx')} has no GPU here; "
                "use --device cpu"
            )

    def open(self, request: LoadRequest) -> MlxEngine:
        """Load a base model and add the LoRA layers."""
        self.check(request.device)
        on_gpu = request.device != "cpu" and has_gpu()
        return MlxEngine(load_model(request, on_gpu=on_gpu), request, on_gpu=on_gpu)

    def stock_logits(self, model_dir: Path, adapter_dir: Path, tokens: Int32) -> Float32:
        """Compute the logits (T, vocabulary) of one document with mlx-lm.

        Raises:
            AdapterError: when mlx-lm does not load the adapter.
        """
        with mx.stream(mx.cpu):
            model, _ = load_with_mlx_lm(model_dir)
            model.set_dtype(mx.float32)
            try:
                model = load_adapters(model, str(adapter_dir))
            except (ValueError, KeyError, AttributeError, RuntimeError) as cause:
                raise AdapterError(f"mlx-lm does not load {adapter_dir}: {cause}") from cause
            model.eval()
            return np.array(model(mx.array(tokens)[None])[0].astype(mx.float32))

    def describe(self) -> BackendDescription:
        """Return versions, devices, BLAS and the number of threads."""
        from phi3_lora_mlx import BLAS

        return BackendDescription(
            versions={name: version(name) for name in ("mlx", "mlx-lm")},
            devices=("gpu", "cpu") if has_gpu() else ("cpu",),
            blas=os.path.basename(BLAS) if BLAS else "built-in",
            num_threads=int(os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1),
        )

    def diagnose(self) -> list[str]:
        """Return a message if MLX uses a slow BLAS, with the command that installs a fast one."""
        if has_gpu() or not uses_reference_blas():
            return []
        return [
            "MLX multiplies matrices with its wheel's reference BLAS, on one core and without "
            "vector instructions. OpenBLAS makes training 10 to 20 times faster: "
            f"pip install {OPENBLAS_WHEEL} (in a program of yours, import phi3_lora_mlx before "
            "mlx.core)"
        ]
