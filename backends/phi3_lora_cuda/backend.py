"""The PyTorch backend: it opens engines and describes this machine for `doctor`."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import peft  # noqa: F401

# PEFT and PyTorch first: a missing package is reported before slow imports.
import torch
import transformers  # noqa: F401

from phi3_lora.arrays import Float32, Int32
from phi3_lora.engine.protocol import BackendDescription
from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import BackendUnavailableError
from phi3_lora_cuda.engine import CudaEngine
from phi3_lora_cuda.model import load_model
from phi3_lora_cuda.stock import stock_logits


class CudaBackend:
    """PyTorch with PEFT."""

    name = "cuda"
    quantizations = frozenset({"nf4"})
    stock_tool = "PEFT"
    stock_layout = "peft"

    def check(self, device: str = "auto") -> None:
        """Check that the device exists.

        Raises:
            BackendUnavailableError: when a GPU is requested and PyTorch sees no GPU.
        """
        if device == "gpu" and not torch.cuda.is_available():
            built = torch.version.cuda or "no CUDA"
            raise BackendUnavailableError(
                f"--backend cuda found no NVIDIA GPU (PyTorch {torch.__version__}, built for "
                f"{built}): add --device cpu to run PyTorch on the CPU"
            )

    def open(self, request: LoadRequest) -> CudaEngine:
        """Load a base model and add the LoRA layers."""
        self.check(request.device)
        use_gpu = request.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if use_gpu else "cpu")
        return CudaEngine(load_model(request, device), request, device)

    def stock_logits(self, model_dir: Path, adapter_dir: Path, tokens: Int32) -> Float32:
        """Compute the logits (T, vocabulary) of one document with transformers and PEFT.

        Raises:
            AdapterError: when PEFT does not load the adapter.
        """
        return stock_logits(model_dir, adapter_dir, tokens)

    def describe(self) -> BackendDescription:
        """Return versions, devices and the number of threads."""
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return BackendDescription(
            versions={name: version(name) for name in ("torch", "transformers", "peft")},
            devices=(*gpus, "cpu"),
            num_threads=torch.get_num_threads(),
        )

    def diagnose(self) -> list[str]:
        """Return a message if there is an NVIDIA GPU that this PyTorch cannot use."""
        if shutil.which("nvidia-smi") and not torch.cuda.is_available():
            return [
                f"there is an NVIDIA GPU, but PyTorch {torch.__version__} cannot use it: "
                "pip install --force-reinstall torch"
            ]
        return []
